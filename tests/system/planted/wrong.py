"""verify with a bug: ``wrong.py BUG ARGUMENTS OF VERIFY``; the seams where parts meet, undone."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mpmp import verify
from mpmp.comm.mesh import Mesh
from mpmp.models.gpt import GPTStage
from mpmp.optim import clip
from mpmp.parallel import adjoints, data, pipeline, tensor
from mpmp.parallel.dropout import Dropout
from mpmp.parallel.placement import placement_of


def gradients_not_summed() -> None:
    """Replicas keep their own gradients."""
    data.Bucket.start = lambda self: None  # type: ignore[method-assign]


def last_bucket_not_summed() -> None:
    """One bucket is forgotten at the end of backward."""
    finish = data.GradientBuckets.finish

    def forget(self: data.GradientBuckets) -> None:
        self.buckets[-1]._sum = None
        finish(self)

    data.GradientBuckets.finish = forget  # type: ignore[method-assign]


def loss_of_the_replica() -> None:
    """The loss is divided by the replica's own tokens."""
    train = pipeline.Pipeline.train

    def scaled(self: Any, microbatches: Any, num_tokens: int, buckets: Any) -> Tensor:
        own = sum(one.inputs.numel() for one in microbatches)
        return train(self, microbatches, own, buckets)

    pipeline.Pipeline.train = scaled  # type: ignore[method-assign]


def blocks_swapped() -> None:
    """Two blocks of the last stage change places."""
    init = GPTStage.__init__

    def swapped(self: Any, model: Any, vocabulary: int, mesh: Mesh, dtype: Any) -> None:
        init(self, model, vocabulary, mesh, dtype)
        if mesh.pipeline.size > 1 and mesh.is_last_stage:
            first, second, *rest = self.blocks
            self.blocks = torch.nn.ModuleList([second, first, *rest])

    GPTStage.__init__ = swapped  # type: ignore[method-assign]


def weights_swapped() -> None:
    """Two blocks of the last stage have each other's values."""
    init = GPTStage.__init__

    def swapped(self: Any, model: Any, vocabulary: int, mesh: Mesh, dtype: Any) -> None:
        init(self, model, vocabulary, mesh, dtype)
        if mesh.pipeline.size > 1 and mesh.is_last_stage:
            pairs = zip(self.blocks[0].parameters(), self.blocks[1].parameters(), strict=True)
            for one, other in pairs:
                one.data, other.data = other.data, one.data

    GPTStage.__init__ = swapped  # type: ignore[method-assign]


def replicate_without_backward() -> None:
    """The gradient of a column-parallel layer's input is this rank's part alone."""
    adjoints.replicate_linear = lambda x, weight, bias, group: F.linear(x, weight, bias)


def bias_on_every_rank() -> None:
    """A row-parallel layer adds its bias before the sum."""

    def forward(self: tensor.RowParallelLinear, x: Tensor) -> Tensor:
        return adjoints.allreduce(F.linear(x, self.weight, self.bias), self.group)

    tensor.RowParallelLinear.forward = forward  # type: ignore[method-assign]


def norm_counts_copies() -> None:
    """The clip norm counts what every tensor rank has a copy of once a rank."""
    from mpmp.job import training

    def counted(parameters: Any, model: Any) -> Tensor:
        squares = torch.stack([one.grad.double().square().sum() for one in parameters]).sum()
        return model.allreduce(squares.view(1)).sqrt().squeeze(0)

    clip.global_norm = training.global_norm = counted  # type: ignore[assignment]


def dropout_of_local_samples() -> None:
    """Masks are keyed by the row in the microbatch, not by the sample's number."""
    call = Dropout.__call__

    def local(self: Dropout, x: Tensor, samples: Tensor | None, *rest: Any) -> Tensor:
        return call(self, x, None if samples is None else samples - samples[0], *rest)

    Dropout.__call__ = local  # type: ignore[method-assign]


def dropout_of_local_heads() -> None:
    """Attention's masks are keyed by the head's number on its rank."""
    call = Dropout.__call__

    def local(self: Dropout, x: Tensor, samples: Tensor | None, shape: Any, ranges: Any) -> Tensor:
        start = ranges[0][0]
        return call(self, x, samples, shape, ((0, ranges[0][1] - start), *ranges[1:]))

    Dropout.__call__ = local  # type: ignore[method-assign]


def tied_ends_not_summed() -> None:
    """First and last stage each keep their own gradient of the embedding they share."""
    start = data.Bucket.start

    def alone(self: data.Bucket) -> None:
        if not placement_of(self.parameters[0]).shared_by:
            start(self)

    data.Bucket.start = alone  # type: ignore[method-assign]


if __name__ == "__main__":
    globals()[sys.argv.pop(1)]()
    verify.main()
