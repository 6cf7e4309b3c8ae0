"""Weights that are gathered for the time of their use: the units of ZeRO's third stage.

    forward     block 0   block 1   block 2   ...     a unit's weights are there before it is
    slot 0      [ w0 ]----[  w2 under way  ]          called, those of the next are under way
    slot 1      [  w1 under way  ]---[ w3 ..
    backward    the same the other way round; what still lies in its slot is not fetched again

Each rank keeps its piece. Two slots take turns, and a unit always has the same one, so its weights
lie at the same addresses in forward and backward, and views that autograd saved stay right. What
belongs to no unit (embedding, last norm, output layer) is gathered once a step and stays.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from math import inf

import torch
from torch import Tensor, nn

from mpmp.comm.group import Group
from mpmp.comm.progress import Handle
from mpmp.parallel.data import Bucket
from mpmp.parallel.flat import Flat, Slot, fill, slots


class Shard:
    """This rank's piece of the weights of a range, and the slot in which they are gathered."""

    def __init__(self, flat: Flat, slot: Slot) -> None:
        self.flat, self._slot = flat, slot
        self._memory = slot.memory[: flat.length]
        whole = torch.cat([one.detach().flatten() for one in flat.parameters])
        self.own = whole[slice(*flat.own)].clone()
        """The piece, updated by the optimizer."""
        self._gather = flat.group.prepare("allgather", self._memory)
        self._handle: Handle | None = None
        self.waited_s = 0.0
        self.put_in()

    def put_in(self, memory: Tensor | None = None) -> None:
        """Let the parameters lie in a memory, or again in the slot."""
        memory = self._memory if memory is None else memory
        for one, view in zip(self.flat.parameters, self.flat.views(memory), strict=True):
            one.data = view

    def fetch(self) -> None:
        """Start to gather, unless the slot holds these weights."""
        if self._slot.holder is self:
            return
        self._slot.take(self)
        self._memory[slice(*self.flat.own)].copy_(self.own)
        self.flat.passes += 1
        self._handle = self._gather.start()

    def wait(self) -> None:
        """Return when what was started is there."""
        if self._handle is not None:
            self.waited_s += self._handle.wait()
            self._handle = None

    def updated(self) -> None:
        """The owners have updated their pieces: what the slot holds is no longer right."""
        self.wait()
        if self._slot.holder is self:
            self._slot.holder = None

    def gathered(self) -> Tensor:
        """All elements of the range, in memory of their own; collective."""
        return self.flat.group.allgather(self.own, self.flat.lengths)


class Whole:
    """The weights of a range, flat and all on every rank; their owners update them."""

    def __init__(self, flat: Flat) -> None:
        self.flat, self.memory = flat, flat.empty()
        for one, view in zip(flat.parameters, flat.views(self.memory), strict=True):
            view.copy_(one.detach())
            one.data = view
        alone = flat.group.size == 1
        self._gather = None if alone else flat.group.prepare("allgather", self.memory)
        self.waited_s = 0.0

    @property
    def own(self) -> Tensor:
        return self.memory[slice(*self.flat.own)]

    def updated(self) -> None:
        """Fetch what the owners have updated."""
        if self._gather is not None:
            self.flat.passes += 1
            began = time.perf_counter()
            self._gather.run()
            self.waited_s += time.perf_counter() - began

    def gathered(self) -> Tensor:
        return self.memory


class Unit:
    """The shards that one module needs, the buckets of its gradients, and its neighbours."""

    def __init__(self, shards: Sequence[Shard], buckets: Sequence[Bucket] = ()) -> None:
        self.shards, self.buckets = shards, buckets
        for one in buckets:
            one.told = True
        self.before: Unit | None = None
        self.after: Unit | None = None

    def follow(self, other: Unit) -> None:
        """Come after another unit in forward."""
        self.before, other.after = other, self

    def fetch(self) -> None:
        """Have the weights under way."""
        for one in self.shards:
            one.fetch()

    def make_whole(self) -> None:
        """Have the weights there."""
        self.fetch()
        for one in self.shards:
            one.wait()


class Watch:
    """Has units gathered when their modules are called, and when backward reaches them."""

    def __init__(self) -> None:
        self.in_backward = False
        self.resting = False
        """All weights are there: nothing is to be done."""
        self.ended: Callable[[Unit], None] = lambda unit: None
        """Called when backward is through with a unit that is not a chunk's first.

        At this point on all ranks alike: were gradients counted, a rank that leaves some unused
        would start its sum later, and what it gathers meanwhile would meet the others' sums.
        """

    def over(self, module: nn.Module, unit: Unit) -> None:
        """Watch a unit's module, whose outputs' gradients all pass before its backward."""

        def before_forward(*_: object) -> None:
            if self.resting:
                return
            unit.make_whole()
            # Blocks that are computed again have their neighbours fetched by backward.
            if unit.after is not None and not self.in_backward:
                unit.after.fetch()

        def before_backward(_: Tensor) -> None:
            if self.resting:
                return
            unit.make_whole()
            if unit.after is not None:
                self.ended(unit.after)
            for bucket in unit.buckets:
                bucket.expect()
            if unit.before is not None:
                unit.before.fetch()

        def after_forward(_: nn.Module, __: object, outputs: object) -> None:
            for one in outputs if isinstance(outputs, tuple) else (outputs,):
                if isinstance(one, Tensor) and one.requires_grad:
                    one.register_hook(before_backward)  # type: ignore[no-untyped-call]

        module.register_forward_pre_hook(before_forward)
        module.register_forward_hook(after_forward)

    def over_rest(self, module: nn.Module, shards: Sequence[Shard]) -> None:
        """Have what no unit has there from the first forward of a step on."""
        unit = Unit(shards)

        def before_forward(*_: object) -> None:
            if not self.resting:
                unit.make_whole()

        module.register_forward_pre_hook(before_forward)


class Units:
    """The units of a rank's chunks, and the weights that are in none.

    ``flats`` are their ranges in the order in which backward completes them, ``weights`` what the
    rank holds of each.
    """

    def __init__(
        self,
        chunks: Sequence[nn.Module],
        used: dict[nn.Parameter, frozenset[int]],
        groups: dict[nn.Parameter, Group],
    ) -> None:
        self._chunks = chunks
        self._modules = [(n, unit) for n, chunk in enumerate(chunks) for unit in units_of(chunk)]
        times = Counter(one for _, module in self._modules for one in module.parameters())
        self._ranges = [
            fill([one for one in module.parameters() if times[one] == 1], used, groups, inf)
            for _, module in self._modules
        ]
        self._rest = fill([one for one in used if times[one] != 1], used, groups, inf)
        turns = slots(flat for flats in self._ranges for flat in flats)
        self.flats = [flat for flats in reversed(self._ranges) for flat in flats] + self._rest
        # Where nobody else has the weights there is nothing to share out.
        self.weights: list[Whole | Shard] = [
            Whole(flat) if flat.group.size == 1 else Shard(flat, turns.get(flat) or Slot([flat]))
            for flat in self.flats
        ]

    def watch(self, watch: Watch, buckets: Mapping[Flat, Bucket]) -> None:
        """Have the units gathered when it is time, and their gradients' sums started."""
        shards = {one.flat: one for one in self.weights if isinstance(one, Shard)}
        previous: tuple[int, Unit] | None = None
        for (chunk, module), flats in zip(self._modules, self._ranges, strict=True):
            unit = Unit(
                [shards[flat] for flat in flats if flat in shards],
                [buckets[flat] for flat in flats if flat in shards],
            )
            if previous is not None and previous[0] == chunk:
                unit.follow(previous[1])
            watch.over(module, unit)
            previous = chunk, unit
        for number, module in enumerate(self._chunks):
            rest = [flat for flat in self._rest if flat in shards and number in flat.chunks]
            watch.over_rest(module, [shards[flat] for flat in rest])


def units_of(chunk: nn.Module) -> list[nn.Module]:
    """The modules of a chunk that are gathered one after the other, in the order of forward."""
    named: Callable[[], Sequence[nn.Module]] | None = getattr(chunk, "units", None)
    if named is not None:
        return list(named())
    blocks = getattr(chunk, "blocks", None)
    return list(blocks) if isinstance(blocks, nn.ModuleList) else []
