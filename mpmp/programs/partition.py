"""Contiguous cuts of a range: how a length that does not divide is shared out."""

from __future__ import annotations

from itertools import pairwise
from math import prod


def partition(length: int, parts: int) -> list[tuple[int, int]]:
    """Cut ``range(length)`` into ``parts`` contiguous pieces whose sizes differ by at most one.

    The longer pieces come first, as ``numpy.array_split`` has it: ``partition(4, 3)`` is
    ``[(0, 2), (2, 3), (3, 4)]``. Pieces are empty where ``parts`` exceeds ``length``.
    """
    if length < 0 or parts < 1:
        raise ValueError(f"cannot cut a length of {length} into {parts} parts")
    size, longer = divmod(length, parts)
    starts = [part * size + min(part, longer) for part in range(parts + 1)]
    return list(pairwise(starts))


def factorisations(number: int, factors: int) -> list[tuple[int, ...]]:
    """All ways to write ``number`` as an ordered product of ``factors`` positive integers."""
    if factors == 1:
        return [(number,)]
    found = [
        (first, *rest)
        for first in range(1, number + 1)
        if number % first == 0
        for rest in factorisations(number // first, factors - 1)
    ]
    assert all(prod(one) == number for one in found)
    return found
