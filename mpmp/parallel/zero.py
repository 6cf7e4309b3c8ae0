"""ZeRO: replicas share out what they would all hold alike (Rajbhandari et al. 2019).

    bytes a rank holds, float32, P parameters, N ranks       elements a rank sends a step
    0   weights 4P     gradients 4P     moments 8P           2P (N-1)/N   allreduce
    1   weights 4P     gradients 4P     moments 8P/N         2P (N-1)/N   reduce-scatter, allgather
    2   weights 4P     gradients 4P/N   moments 8P/N         2P (N-1)/N   the same
    3   weights 4P/N   gradients 4P/N   moments 8P/N         3P (N-1)/N   a second allgather

Parameters lie side by side in flat ranges, of which each rank owns, sums and updates its piece.
Stages 2 and 3 reduce the gradients of every microbatch, for keeping their sum would need room for
all of them; stages 0 and 1 reduce the last. A weight of both ends of a pipeline is shared out at
each end; the two owners of a piece add their gradients.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mpmp.comm.mesh import Mesh
from mpmp.parallel import landing
from mpmp.parallel.data import Bucket, GradientBuckets, replicated_buckets
from mpmp.parallel.flat import Flat, Slot, fill, slots, users
from mpmp.parallel.placement import Placement, placement_of
from mpmp.parallel.units import Shard, Units, Watch, Whole

Shards = dict[str, tuple[Placement, Tensor]]
"""This rank's shards of named tensors."""
_ENDS_TAG = 32001
"""Of messages between the ends of a pipeline, beyond those of microbatches."""


@dataclass(frozen=True, eq=False)
class Piece:
    """What this rank updates of a parameter: elements [start, stop) of its flattened shard."""

    placement: Placement
    start: int
    stop: int
    parameter: nn.Parameter
    """The shard itself where it is not shared out, else one dim."""
    counts: bool
    """Whether it counts here in a norm and is written here: once in the world."""


class Staged(Bucket):
    """Gradients of which this rank keeps its piece; all of them are there while they are summed.

    Where nobody says that backward is about to write them they stay where autograd has put them
    until the bucket is full.
    """

    every_time = True

    def __init__(self, flat: Flat, slot: Slot) -> None:
        super().__init__(flat, "reduce_scatter", slot.memory[: flat.length])
        self._slot = slot
        start, stop = flat.own
        self._own = torch.zeros(stop - start, dtype=flat.dtype, device=flat.device)

    @property
    def own(self) -> Tensor:
        return self._own

    def begin(self) -> None:
        super().begin()
        self._own.zero_()

    def expect(self) -> None:
        """Backward is about to write the gradients: products may land in the slot."""
        self._slot.take(self)
        for one, view in self.views.items():
            landing.begin(one, view)

    def written(self, parameter: nn.Parameter) -> None:
        pass

    def start(self) -> None:
        self._slot.take(self)
        for one, view in self.views.items():
            if one.grad is not None and one.grad is not view:
                view.copy_(one.grad)
            landing.end(one)
        super().start()
        for one in self.flat.parameters:
            one.grad = None

    def wait(self) -> None:
        if self._handle is not None:
            super().wait()
            self._own += self.memory[slice(*self.flat.own)]


class Sharded(GradientBuckets):
    """The parameters of a rank's chunks, their gradients, and what of them the rank updates."""

    def __init__(
        self,
        mesh: Mesh,
        buckets: Sequence[Bucket],
        pieces: Sequence[Piece],
        weights: Sequence[Whole | Shard],
        watch: Watch,
    ) -> None:
        self._ends = [one for one in buckets if one.flat.of_both_ends]
        # Replicas share out a weight at each end; only a sum over both must wait for the other.
        super().__init__(buckets, () if weights else self._ends)
        self._mesh, self._pieces, self._weights, self._watch = mesh, list(pieces), weights, watch
        watch.ended = lambda unit: self.all_written(unit.buckets)

    @property
    def exposed_s(self) -> float:
        """Seconds this rank has waited for sums and weights that computation did not hide."""
        return super().exposed_s + sum(one.waited_s for one in self._weights)

    def pieces(self) -> list[Piece]:
        """What this rank updates, the same objects in every step; gradients are at ``.grad``."""
        return self._pieces

    @contextmanager
    def writing(
        self,
        chunk: int,
        *,
        last: bool = False,
        complete: bool = True,
        deferred: Collection[nn.Parameter] | None = None,
    ) -> Iterator[None]:
        self._watch.in_backward = True
        with super().writing(chunk, last=last, complete=complete, deferred=deferred):
            yield
        self._watch.in_backward = False

    def finish(self) -> None:
        super().finish()
        if self._weights:
            for bucket in self._ends:
                _add_other_end(bucket, self._mesh)

    def step_done(self) -> None:
        """The optimizer has updated the pieces: all ranks together bring the weights together."""
        for one in self._weights:
            one.updated()

    @contextmanager
    def whole(self) -> Iterator[None]:
        """All weights are there for the time, however often each rank calls its chunks.

        All ranks enter together.
        """
        shards = [one for one in self._weights if isinstance(one, Shard)]
        for one in shards:
            one.put_in(one.gathered())
        self._watch.resting = True
        try:
            yield
        finally:
            self._watch.resting = False
            for one in shards:
                one.put_in()

    def weights(self) -> Shards:
        """This rank's shard of each weight; all ranks together."""
        if not self._weights:
            return {
                piece.placement.name: (piece.placement, piece.parameter.detach())
                for piece in self._pieces
            }
        return _named((one.flat, one.gathered()) for one in self._weights)

    def gradients(self) -> Shards:
        """This rank's shard of each gradient after a step; all ranks together."""
        if not self._weights:
            return _named((bucket.flat, bucket.memory) for bucket in self.buckets)
        return _named(
            (bucket.flat, bucket.flat.group.allgather(bucket.own.clone(), bucket.flat.lengths))
            for bucket in self.buckets
        )

    @property
    def sent(self) -> float:
        """Elements that this rank has sent for gradients and weights, in the mean of its groups."""
        return sum(bucket.flat.sent for bucket in self.buckets)


def make(
    chunks: Sequence[nn.Module], mesh: Mesh, stage: int, bucket_bytes: float | None
) -> Sharded:
    """Share the parameters of a rank's chunks out as a stage of ZeRO does; 0 shares nothing."""
    used, watch = users(chunks), Watch()
    if stage == 0:
        replicated = replicated_buckets(chunks, mesh, bucket_bytes)
        own = [_whole_piece(one) for one in used]
        return Sharded(mesh, replicated, own, (), watch)
    groups = {one: mesh.sums[placement_of(one).summed] for one in used}
    units = Units(chunks, used, groups) if stage == 3 else None
    flats = fill(used, used, groups, bucket_bytes) if units is None else units.flats
    weights = [Whole(flat) for flat in flats] if units is None else units.weights
    staged = {} if stage == 1 else slots(flat for flat in flats if flat.group.size > 1)
    buckets = [
        Staged(flat, staged[flat]) if flat in staged else Bucket(flat, "reduce_scatter")
        for flat in flats
    ]
    pieces = [
        piece
        for weight, bucket in zip(weights, buckets, strict=True)
        for piece in _pieces(bucket.flat, weight.own, bucket.own)
    ]
    if units is not None:
        units.watch(watch, dict(zip(flats, buckets, strict=True)))
    return Sharded(mesh, buckets, pieces, weights, watch)


def _whole_piece(parameter: nn.Parameter) -> Piece:
    placement = placement_of(parameter)
    return Piece(placement, 0, parameter.numel(), parameter, placement.primary)


def _pieces(flat: Flat, weight: Tensor, gradient: Tensor) -> Iterator[Piece]:
    """What a rank has of each parameter of a range, of whose elements it owns these."""
    for one, start, stop, at in flat.of_piece():
        placement = placement_of(one)
        parameter = nn.Parameter(weight[at : at + stop - start])
        parameter.grad = gradient[at : at + stop - start]
        yield Piece(placement, start, stop, parameter, placement.counts(placement.summed))


def _named(memories: Iterable[tuple[Flat, Tensor]]) -> Shards:
    return {
        placement_of(one).name: (placement_of(one), view)
        for flat, memory in memories
        for one, view in zip(flat.parameters, flat.views(memory), strict=True)
    }


def _add_other_end(bucket: Bucket, mesh: Mesh) -> None:
    """Add what the owner of the same piece at the other end of the pipeline has summed."""
    own, group = bucket.own, mesh.pipeline
    first, last = placement_of(bucket.flat.parameters[0]).shared_by
    other = last if group.rank == first else first
    theirs = torch.empty_like(own)
    sent = group.send(own.clone(), other, _ENDS_TAG)
    group.receive(theirs, other, _ENDS_TAG).wait()
    sent.wait()
    own += theirs
