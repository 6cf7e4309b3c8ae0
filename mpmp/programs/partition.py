"""Contiguous cuts: how a length that does not divide, or a row of costs, is shared out."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
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


def balanced(costs: Sequence[float], parts: int) -> list[tuple[int, int]]:
    """Cut a row of costs into ``parts`` contiguous pieces whose dearest is as cheap as can be.

    No piece is empty as long as there are ``parts`` costs. Of equal cuts it is the one whose later
    pieces are the longer ones. The dynamic programme over f[j][i], the dearest of j pieces of the
    first i costs: f[j][i] = min over q of max(f[j-1][q], cost of q to i).
    """
    length = len(costs)
    if parts < 1 or any(cost < 0 for cost in costs):
        raise ValueError(f"cannot cut the costs {list(costs)} into {parts} parts")
    if length < parts:
        return partition(length, parts)
    upto = [0.0, *accumulate(costs)]
    # With one piece everything is in it; cuts[j][i] is where the last of j + 1 pieces begins.
    dearest = upto
    cuts = [[0] * (length + 1)]
    for part in range(1, parts):
        last: list[tuple[float, int]] = [(0.0, 0)] * (part + 1)
        for stop in range(part + 1, length + 1):
            last.append(min((max(dearest[q], upto[stop] - upto[q]), q) for q in range(part, stop)))
        dearest = [cost for cost, _ in last]
        cuts.append([start for _, start in last])
    stops = [length]
    for starts in reversed(cuts):
        stops.append(starts[stops[-1]])
    return list(pairwise(reversed(stops)))


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
