"""How the T positions of a sequence are cut over the ranks of a context group.

    contiguous, 2 ranks   0 0 0 0 1 1 1 1     every query sees every key: equal work
    zig-zag,    2 ranks   0 0 1 1 1 1 0 0     causal: each rank has an early and a late piece

With a causal mask the query at position i costs i + 1 products, so contiguous pieces would leave
the last rank with almost 2C - 1 times the work of the first. In the zig-zag, rank r of C holds
pieces r and 2C - 1 - r of 2C, whose costs add up to the same for all, and all that it computes but
the diagonal stays rectangular (Dubey et al. 2024, "The Llama 3 herd of models", section 3.3.2).
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from mpmp.programs.partition import partition

Pieces = tuple[tuple[int, int], ...]
"""What one rank holds: (start, stop) of positions, ascending, none empty."""
Cut = tuple[Pieces, ...]
"""What each rank of the group holds; every position once."""


class Block(NamedTuple):
    """Queries ``[start, stop)`` of a rank see the keys ``[0, keys)`` of another, in local places.

    ``diagonal``: query and key are numbered alike and a query sees no later key.
    """

    start: int
    stop: int
    keys: int
    diagonal: bool = False


def contiguous(length: int, ranks: int) -> Cut:
    """One piece a rank; none where there are more ranks than positions."""
    return tuple(_without_empty([piece]) for piece in partition(length, ranks))


def zigzag(length: int, ranks: int) -> Cut:
    """Two pieces a rank, an early and a late one, that together cost the same under causality."""
    pieces = partition(length, 2 * ranks)
    return tuple(_without_empty([pieces[rank], pieces[-1 - rank]]) for rank in range(ranks))


@lru_cache
def cut_sequence(length: int, ranks: int, kind: str, causal: bool) -> Cut:
    """The cut that suits a way of attention: "ring" or "ulysses", causal or not."""
    return zigzag(length, ranks) if kind == "ring" and causal else contiguous(length, ranks)


def positions(pieces: Pieces) -> list[int]:
    """The places in the sequence of what a rank holds, ascending."""
    return [place for start, stop in pieces for place in range(start, stop)]


def count(pieces: Pieces) -> int:
    """How many positions a rank holds."""
    return sum(stop - start for start, stop in pieces)


@lru_cache
def blocks(queries: Pieces, keys: Pieces, causal: bool) -> tuple[Block, ...]:
    """What the queries of one rank see of the keys of another: few rectangles, or the diagonal.

    Where causal, no piece of the one may lie partly before a piece of the other, as in the cuts
    above.
    """
    num_queries, num_keys = count(queries), count(keys)
    if not num_queries or not num_keys:
        return ()
    if not causal:
        return (Block(0, num_queries, num_keys),)
    if queries == keys:
        return (Block(0, num_queries, num_keys, diagonal=True),)
    found: list[Block] = []
    place = 0
    for start, stop in queries:
        assert all(last <= start or first >= stop for first, last in keys), "pieces overlap"
        seen = sum(last - first for first, last in keys if last <= start)
        block = Block(place, place + stop - start, seen)
        place = block.stop
        if found and found[-1].keys == seen:
            block = found.pop()._replace(stop=block.stop)
        found.append(block)
    return tuple(block for block in found if block.keys)


def products(cut: Cut, causal: bool) -> list[int]:
    """Pairs of a query and a key that each rank computes: how well a cut is balanced."""
    return [
        sum(_pairs(block) for keys in cut for block in blocks(queries, keys, causal))
        for queries in cut
    ]


def _pairs(block: Block) -> int:
    queries = block.stop - block.start
    return queries * (queries + 1) // 2 if block.diagonal else queries * block.keys


def _without_empty(pieces: list[tuple[int, int]]) -> Pieces:
    """Ascending pieces without the empty ones."""
    return tuple((start, stop) for start, stop in pieces if start < stop)
