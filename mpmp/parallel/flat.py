"""Flat ranges: parameters side by side, so that many travel as one and ranks can share them out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Protocol

from torch import Tensor, nn

from mpmp.comm.group import Group
from mpmp.parallel.placement import placement_of
from mpmp.programs.partition import partition

_SMALL_BYTES, _LARGE_BYTES = 0.5e6, 4e6


class Flat:
    """Parameters side by side in one range of elements, of which each rank has a piece.

    | w0 .......... | w1 ...... | w2 |    ``length`` elements; ``own`` is the (start, stop) of this
    | rank 0    | rank 1    | rank 2 |    rank's piece, ``chunks`` those that use the parameters
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], group: Group, chunks: frozenset[int]
    ) -> None:
        self.parameters, self.group, self.chunks = tuple(parameters), group, chunks
        ends = list(accumulate(one.numel() for one in parameters))
        self.length, self.starts = ends[-1], [0, *ends[:-1]]
        self.lengths = [stop - start for start, stop in partition(self.length, group.size)]
        self.own = partition(self.length, group.size)[group.rank]
        self.passes = 0
        """How often each element has left a rank, but for one of the ranks: 2 for an allreduce."""
        first = parameters[0]
        self.dtype, self.device = first.dtype, first.device
        self.kind = group, placement_of(first).summed, first.dtype

    def empty(self) -> Tensor:
        """Memory for all elements, shared with the group where there is room."""
        return self.group.empty((self.length,), self.dtype, self.device)

    def views(self, memory: Tensor) -> list[Tensor]:
        """Each parameter's elements of a memory that holds the range, in its shape."""
        return [
            memory[start : start + one.numel()].view(one.shape)
            for start, one in zip(self.starts, self.parameters, strict=True)
        ]

    def of_piece(self) -> Iterator[tuple[nn.Parameter, int, int, int]]:
        """What this rank's piece has of each parameter: its elements [start, stop), and where."""
        low, high = self.own
        for begin, one in zip(self.starts, self.parameters, strict=True):
            start, stop = max(low, begin), min(high, begin + one.numel())
            if start < stop:
                yield one, start - begin, stop - begin, start - low

    @property
    def of_both_ends(self) -> bool:
        """Whether the parameters are used at both ends of the pipeline."""
        return bool(placement_of(self.parameters[0]).shared_by)

    @property
    def sent(self) -> float:
        """Elements that a rank has had to send, in the mean over the group's ranks."""
        size = self.group.size
        return self.passes * self.length * (size - 1) / size


class Holder(Protocol):
    """What is under way in a slot."""

    def wait(self) -> None: ...


class Slot:
    """Memory that several ranges use one after the other."""

    def __init__(self, flats: Sequence[Flat]) -> None:
        self.memory = max(flats, key=lambda flat: flat.length).empty()
        self.holder: Holder | None = None

    def take(self, holder: Holder) -> None:
        """Wait until whoever had it is done with it."""
        if self.holder is not None:
            self.holder.wait()
        self.holder = holder


def slots(flats: Iterable[Flat]) -> dict[Flat, Slot]:
    """Two slots for ranges that are summed alike, taken in turns in their order."""
    alike: dict[object, tuple[list[Flat], list[Flat]]] = {}
    for flat in flats:
        first, second = alike.setdefault(flat.kind, ([], []))
        (first if len(first) == len(second) else second).append(flat)
    found: dict[Flat, Slot] = {}
    for members in (turn for turns in alike.values() for turn in turns if turn):
        slot = Slot(members)
        found |= dict.fromkeys(members, slot)
    return found


def users(chunks: Iterable[nn.Module]) -> dict[nn.Parameter, frozenset[int]]:
    """The chunks that use each parameter, in the order in which forward does."""
    found: dict[nn.Parameter, frozenset[int]] = {}
    for number, chunk in enumerate(chunks):
        for one in chunk.parameters():
            found[one] = found.get(one, frozenset()) | {number}
    return found


def fill(
    parameters: Iterable[nn.Parameter],
    used: dict[nn.Parameter, frozenset[int]],
    groups: dict[nn.Parameter, Group],
    most_bytes: float | None = None,
) -> list[Flat]:
    """Cut parameters, last used first, into ranges of at most ``most_bytes`` that are summed alike.

    A parameter that is larger has a range of its own. Ranges stand in the order in which backward
    completes them. ``most_bytes`` omitted: what suits the group, see `usual_bytes`.
    """
    total: Counter[Group] = Counter()
    for one in used:
        total[groups[one]] += one.nbytes
    done: list[tuple[int, list[nn.Parameter]]] = []
    filling: dict[object, tuple[int, list[nn.Parameter]]] = {}
    for place, one in enumerate(reversed(list(parameters))):
        placement = placement_of(one)
        key = groups[one], placement.summed, one.dtype, used[one], placement.shared_by
        _, members = filling.get(key, (0, []))
        most = most_bytes or usual_bytes(groups[one], total[groups[one]])
        if members and sum(other.nbytes for other in members) + one.nbytes > most:
            done.append(filling.pop(key))
            members = []
        filling[key] = place, [*members, one]
    done += filling.values()
    done.sort(key=lambda found: found[0])
    return [Flat(members, groups[members[0]], used[members[0]]) for _, members in done]


def usual_bytes(group: Group, total: int) -> float:
    """Bytes of a range, where ``total`` are summed over a group.

    In memory that ranks share a call costs little. Between hosts nothing hides the wait for the
    first range to fill and the sum of the last: a twentieth each. Below 0.5 MB latencies count.
    """
    if len(set(group.hosts)) == 1:
        return _LARGE_BYTES
    return min(max(total / 20, _SMALL_BYTES), _LARGE_BYTES)
