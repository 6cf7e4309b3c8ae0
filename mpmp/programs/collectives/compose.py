"""Programs made of programs: one runs on some of the ranks and on a span of the chunks.

    ranks     0 1 2 3 | 4 5 6 7       on(Members(place, 2, leader), program): ranks 0 and 4 run it
    place     0 - - - | 1 - - -       as ranks 0 and 1 of a group of two, the others do nothing.

A rank that is absent yields the same rounds with NONE for every peer, so that programs stay without
branches on the rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from mpmp.programs.steps import NONE, Ranks, Round, Send, Step, where

Program = Callable[..., Iterator[Round]]


@dataclass(frozen=True, slots=True)
class Members:
    """Some of the ranks, seen as a group of ``size``.

    ``place`` is this rank's rank in it, NONE where it is absent; ``member(place)`` is the rank at a
    place, NONE where nobody is: a tree may be cut short there, and nothing else.
    """

    place: Ranks
    size: int
    member: Callable[[Ranks], Ranks]


def on(
    members: Members, program: Program, *, first: Ranks = 0, width: int = 1, **facts: Any
) -> Iterator[Round]:
    """``program`` on the members; its chunk c is the ``width`` chunks from ``first + c width``."""
    present = members.place != NONE

    def moved(step: Step) -> Step:
        peer = step.to if isinstance(step, Send) else step.source
        alive = present & (peer != NONE)
        rank = where(alive, members.member(where(alive, peer, 0)), NONE)
        chunk, count = first + step.chunk * width, step.count * width
        if isinstance(step, Send):
            return Send(chunk, rank, count)
        return replace(step, chunk=chunk, source=rank, count=count)

    for one in program(where(present, members.place, 0), members.size, **facts):
        yield Round(*map(moved, one.steps))


def cyclic(start: Ranks, count: Ranks, size: int, peer: Ranks) -> list[tuple[Ranks, Ranks, Ranks]]:
    """The ``count`` chunks from ``start`` on in a circle of ``size``, for one peer.

    Two spans as (chunk, peer, count); what lies beyond the end is the second, whose peer is NONE
    where nothing does. ``start`` is the same on both sides of a message, and so are its spans.
    """
    before_end = where(start + count > size, size - start, count)
    beyond = count - before_end
    return [(start, peer, before_end), (0, where(beyond > 0, peer, NONE), beyond)]


def is_power_of_two(size: int) -> bool:
    return size & (size - 1) == 0
