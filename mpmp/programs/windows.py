"""The words of a window program: what one rank does in memory that the ranks of a host share.

Every rank has a *window*, its own buffer, which all the others can read and write. Nothing is
sent: a rank says that its window is ready, waits until others have said so, and combines what lies
in the windows where it is.

    def allreduce(rank, size):
        yield Publish()                          # my input is there
        yield Await(ALL)                         # so is everybody's
        yield Combine(rank, sum_from=ALL, store_to=ALL)
        yield Publish()                          # my chunk is summed and in all windows
        yield Await(ALL)

Rules, the same for the checker and for those who carry it out:

1. ``Await`` of a rank returns when that rank has published as often as this one has.
2. All ranks publish equally often. Every program begins, after what it loads, with ``Publish`` and
   ``Await(ALL)``: there the ranks compare what they are about to do, and learn where the windows
   lie.
3. Summands are added in rank order, each result is rounded once.
4. When a program has ended on a rank it may write to its own window at once. Where that would be
   too early, or the others cannot reach the input, it passes through two *slots*:
   ``Load`` copies to the slot whose turn it is, ``Publish`` gives the turn to the other, and
   ``Combine`` reads what was published last, its own rank's part where it was loaded from. A slot
   holds one of the ``pieces`` in which a buffer passes; each chunk has its place there, in which
   those of all pieces lie one after another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from mpmp.programs.steps import NONE

ALL = -2
"""Every rank of the group, where a word asks for ranks."""
RESULT = -3
"""This rank's private result, where a word asks for a window to store to."""
RESULT_AND_SLOT = -4
"""The same and this rank's slot whose turn it is, in one pass."""
PIECE_BYTES = 512 * 1024
"""Room in a slot: meetings are few, and a rank's part is still in its cache when it is summed."""


@dataclass(frozen=True, slots=True)
class Publish:
    """What this rank has done so far may be seen by whoever awaits it."""


@dataclass(frozen=True, slots=True)
class Await:
    """Go on when ``source`` (a rank, or ALL) has published as often as this rank."""

    source: Any


@dataclass(frozen=True, slots=True)
class Combine:
    """``count`` chunks from ``chunk`` on, summed over windows, are stored to windows, in one pass.

    ``sum_from`` is a rank or ALL; ``store_to`` a rank, ALL, RESULT or RESULT_AND_SLOT.
    """

    chunk: Any
    sum_from: Any
    store_to: Any
    count: Any = 1


@dataclass(frozen=True, slots=True)
class Load:
    """This rank's input of ``chunk`` is copied to the slot whose turn it is."""

    chunk: Any

    @property
    def count(self) -> int:
        """One chunk: those of a slot need not lie side by side."""
        return 1


WindowStep = Publish | Await | Combine | Load


@dataclass(frozen=True, slots=True)
class WindowCost:
    """The published cost on n bytes: how often ranks wait for one another, and bytes touched.

    ``read`` and ``written`` are the most that any rank reads and writes, as multiples of n.
    """

    syncs: int
    read: Fraction
    written: Fraction


@dataclass(frozen=True, slots=True)
class WindowAlgorithm:
    """A window program with what must be known to run and to judge it; see steps.Algorithm."""

    program: Callable[..., Iterator[WindowStep]]
    num_chunks: Callable[..., int]
    cost: Callable[..., WindowCost]
    facts: tuple[str, ...] = ()
    slots: int = 0
    """Through how many slots its ``pieces`` pass, in turns; 0: all is combined where it lies."""
    fixed_order: bool = True

    def taken(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        """Of what is known of a group and a call, the facts that this program takes."""
        return {name: facts[name] for name in self.facts if name in facts}

    def chunks_of_piece(self, size: int) -> int:
        """How many chunks a slot holds: chunk c has place c modulo that."""
        return self.num_chunks(size)


def members(source: int, size: int) -> range:
    """The ranks that a word speaks of."""
    return range(size) if source == ALL else range(source, source + 1)


def touched(step: Any, size: int) -> tuple[Any, Any]:
    """How often a step reads and writes each of its chunks; arrays where ranks are an array."""
    if isinstance(step, Load):
        return 1, 1
    if not isinstance(step, Combine):
        return 0, 0
    used, target = np.not_equal(step.store_to, NONE), step.store_to
    written = np.where(
        np.equal(target, ALL), size, np.where(np.equal(target, RESULT_AND_SLOT), 2, 1)
    )
    return used * np.where(np.equal(step.sum_from, ALL), size, 1), used * written
