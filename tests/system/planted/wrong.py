"""verify with a bug: ``wrong.py BUG ARGUMENTS OF VERIFY``; the seams where parts meet, undone."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mpmp import verify
from mpmp.comm.mesh import Mesh
from mpmp.models.stage import TransformerStage
from mpmp.optim import clip
from mpmp.parallel import adjoints, data, pipeline, products, tensor, zero
from mpmp.parallel.deferred import Deferred, Kept
from mpmp.parallel.dropout import Dropout
from mpmp.parallel.maker import Maker
from mpmp.parallel.ring import _Ring
from mpmp.parallel.stage import NOT_COUNTED


def _unsummed(chosen: Callable[[data.Bucket], bool]) -> None:
    """Some buckets keep this rank's own gradients."""
    start = data.Bucket.start

    def alone(self: data.Bucket) -> None:
        if chosen(self):
            self._reduce = None
        start(self)

    data.Bucket.start = alone  # type: ignore[method-assign]


def gradients_not_summed() -> None:
    """Replicas keep their own gradients."""
    _unsummed(lambda bucket: True)


def last_bucket_not_summed() -> None:
    """One bucket is forgotten at the end of backward."""
    finish = data.GradientBuckets.finish

    def forget(self: data.GradientBuckets) -> None:
        self.buckets[-1]._reduce = None
        finish(self)

    data.GradientBuckets.finish = forget  # type: ignore[method-assign]


def tied_ends_not_summed() -> None:
    """First and last stage each keep their own gradient of the embedding they share."""
    _unsummed(lambda bucket: bucket.flat.of_both_ends)


def norms_not_summed() -> None:
    """What the ranks of a tensor group use apart is summed over the replicas alone."""
    make = Maker.parameter

    def alike(self: Maker, *args: Any, **settings: Any) -> Any:
        return make(self, *args, **{**settings, "apart": False})

    Maker.parameter = alike  # type: ignore[method-assign]


def experts_summed_over_all_replicas() -> None:
    """Gradients of experts are summed with those of other experts."""
    sum_group = Mesh.sum_group

    def everywhere(self: Mesh, placement: Any) -> Any:
        if "expert" not in placement.summed:
            return self.data
        return sum_group(self, placement)

    Mesh.sum_group = everywhere  # type: ignore[method-assign]


def loss_of_the_replica() -> None:
    """The loss is divided by the replica's own tokens."""
    train = pipeline.Pipeline.train

    def scaled(self: Any, microbatches: Any, num_tokens: int, *rest: Any) -> Tensor:
        own = sum(int((one.targets_Bt != NOT_COUNTED).sum()) for one in microbatches)
        return train(self, microbatches, own, *rest)

    pipeline.Pipeline.train = scaled  # type: ignore[method-assign]


def _last_stage(change: Callable[[TransformerStage], None]) -> None:
    init = TransformerStage.__init__

    def changed(self: TransformerStage, *args: Any, **settings: Any) -> None:
        init(self, *args, **settings)
        if self.part.stages > 1 and self.part.last:
            change(self)

    TransformerStage.__init__ = changed  # type: ignore[method-assign]


def blocks_swapped() -> None:
    """Two blocks of the last stage change places."""

    def swap(stage: TransformerStage) -> None:
        first, second, *rest = stage.blocks
        stage.blocks = torch.nn.ModuleList([second, first, *rest])

    _last_stage(swap)


def weights_swapped() -> None:
    """Two blocks of the last stage have each other's values."""

    def swap(stage: TransformerStage) -> None:
        pairs = zip(stage.blocks[0].parameters(), stage.blocks[1].parameters(), strict=True)
        for one, other in pairs:
            one.data, other.data = other.data, one.data

    _last_stage(swap)


def replicate_without_backward() -> None:
    """The gradient of a column-parallel layer's input is this rank's part alone."""
    products._summed = lambda x, way: x


def bias_on_every_rank() -> None:
    """A row-parallel layer adds its bias before the sum."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return adjoints.allreduce(F.linear(x, self.weight, self.bias), self.way.group)

    tensor.RowParallelLinear.forward = forward  # type: ignore[method-assign]


def weight_gradient_lost() -> None:
    """A split backward forgets one weight of those it has left for later."""
    end = Deferred.end

    def forgetful(self: Deferred) -> Kept:
        return end(self)[1:]

    Deferred.end = forgetful  # type: ignore[method-assign]


def weights_not_gathered() -> None:
    """After a step each rank has its own piece of the new weights alone."""
    zero.Sharded.step_done = lambda self: None  # type: ignore[method-assign]


def keys_of_one_rank_skipped() -> None:
    """Queries do not see the keys of the rank that is left of theirs."""
    blocks = _Ring._blocks

    def fewer(self: _Ring, source: int) -> Any:
        return () if source == self.left else blocks(self, source)

    _Ring._blocks = fewer  # type: ignore[method-assign]


def padding_seen() -> None:
    """Ranks that share sequences see keys that are padding."""
    mask = _Ring._mask

    def every(self: _Ring, *args: Any) -> Any:
        return mask(replace(self, rule=replace(self.rule, lengths_B=None)), *args)

    _Ring._mask = every  # type: ignore[method-assign]


def norm_counts_copies() -> None:
    """The clip norm counts what every tensor rank has a copy of once a rank."""
    from mpmp.job import training

    def counted(pieces: Any, everyone: Any) -> Tensor:
        squares = [one.parameter.grad.double().square().sum() for one in pieces]
        return everyone.allreduce(torch.stack(squares).sum().view(1)).sqrt().squeeze(0)

    clip.global_norm = training.global_norm = counted


def dropout_of_local_samples() -> None:
    """Masks are keyed by the row in the microbatch, not by the sample's number."""
    call = Dropout.__call__

    def local(self: Dropout, x: Tensor, samples: Tensor | None, *rest: Any) -> Tensor:
        return call(self, x, None if samples is None else samples - samples[0], *rest)

    Dropout.__call__ = local  # type: ignore[method-assign]


def dropout_of_local_heads() -> None:
    """Attention's masks are keyed by the head's number on its rank."""
    call = Dropout.__call__

    def local(self: Dropout, x: Tensor, samples: Tensor | None, shape: Any, index: Any) -> Tensor:
        if isinstance(index[0], tuple):
            start, stop = index[0]
            index = ((0, stop - start), *index[1:])
        return call(self, x, samples, shape, index)

    Dropout.__call__ = local  # type: ignore[method-assign]


if __name__ == "__main__":
    globals()[sys.argv.pop(1)]()
    verify.main()
