"""The actions of one rank, written down one after another without counting microbatches."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator

from mpmp.programs.steps import BACKWARD, FORWARD, WEIGHT, Action, Actions, Fused


class Order:
    """Each word takes the chunk's next microbatch; ``weight`` the part that has waited longest."""

    def __init__(self) -> None:
        self.actions: Actions = []
        self.forwards: Counter[int] = Counter()
        self._backwards: Counter[int] = Counter()
        self.waiting: deque[Action] = deque()

    def forward(self, chunk: int) -> None:
        self.actions.append(self._forward(chunk))

    def backward(self, chunk: int) -> None:
        self.actions.append(self._backward(chunk))

    def fused(self, forward: int, backward: int) -> None:
        """A forward of one chunk with a backward of the other."""
        self.actions.append(Fused(self._forward(forward), self._backward(backward)))

    def weight(self) -> None:
        self.actions.append(self.waiting.popleft())

    def _forward(self, chunk: int) -> Action:
        self.forwards[chunk] += 1
        return Action(FORWARD, self.forwards[chunk] - 1, chunk)

    def _backward(self, chunk: int) -> Action:
        microbatch = self._backwards[chunk]
        self._backwards[chunk] += 1
        self.waiting.append(Action(WEIGHT, microbatch, chunk))
        return Action(BACKWARD, microbatch, chunk)


def only(actions: Iterable[Action | Fused], microbatches: int) -> Iterator[Action | Fused]:
    """The actions of the first microbatches: what one microbatch waits for is no other's action.

    So a schedule for many is one for fewer, too, where the paper asks for a certain number.
    """
    for action in actions:
        parts = [part for part in action.parts if part.microbatch < microbatches]
        if len(parts) == len(action.parts):
            yield action
        else:
            yield from parts
