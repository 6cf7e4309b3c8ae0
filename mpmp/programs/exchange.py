"""Exchanges: all that moves between all ranks in one round, as columns and as messages."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mpmp.programs.steps import Receive, Reduce, Send

Vector = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Message:
    """What goes from ``sender`` to ``receiver`` in one round; the i-th send meets the i-th put."""

    sender: int
    receiver: int
    sends: tuple[Send, ...]
    puts: tuple[Receive | Reduce, ...]


@dataclass(frozen=True, slots=True)
class Exchange:
    """All that moves in one round: a row for each step that sends and the step that takes it.

    ``count`` chunks from ``sent`` on of ``sender`` go to those from ``put`` on of ``receiver``.
    Rows are in the order of sender, receiver and place in the message.
    """

    sender: Vector
    receiver: Vector
    sent: Vector
    put: Vector
    count: Vector
    combines: NDArray[np.bool_]

    @property
    def first_rows(self) -> Vector:
        """Where in the rows a message begins."""
        new = (np.diff(self.sender) != 0) | (np.diff(self.receiver) != 0)
        return np.flatnonzero(np.concatenate(([True], new))[: len(self.sender)])

    @property
    def messages(self) -> list[Message]:
        """The rows as messages."""
        firsts = self.first_rows.tolist()
        return [
            self._message(range(first, stop))
            for first, stop in zip(firsts, [*firsts[1:], len(self.sender)], strict=True)
        ]

    def _message(self, rows: range) -> Message:
        sender, receiver = int(self.sender[rows[0]]), int(self.receiver[rows[0]])
        sends: list[Send] = []
        puts: list[Receive | Reduce] = []
        for row in rows:
            count = int(self.count[row])
            kind = Reduce if self.combines[row] else Receive
            sends.append(Send(int(self.sent[row]), receiver, count))
            puts.append(kind(int(self.put[row]), sender, count))
        return Message(sender, receiver, tuple(sends), tuple(puts))


def spread(start: Vector, count: Vector) -> Vector:
    """All numbers of the spans that begin at ``start``, one span after another."""
    ends = np.cumsum(count)
    total = int(ends[-1]) if len(ends) else 0
    return np.repeat(start - ends + count, count) + np.arange(total)
