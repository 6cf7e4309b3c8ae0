"""Layers cut over the tensor axis (Shoeybi et al. 2019, section 3).

    x (replicated) -------------> ColumnParallelLinear -> own heads or hidden units
                                  RowParallelLinear    --allreduce--> y (replicated)

One allreduce in each direction for a pair of layers. Under sequence parallelism (Korthikanti et al.
2022) x and y are cut over T, and an allgather and a reduce-scatter take its place. What does not
divide is cut unevenly.

Shapes: B batch, T time, D model, V vocabulary; a small letter is this rank's piece of it, u of T.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mpmp.comm.group import Group
from mpmp.parallel import adjoints
from mpmp.parallel.cross_entropy import vocab_parallel_cross_entropy
from mpmp.parallel.maker import Maker
from mpmp.parallel.products import Use, Way, column, row


def way_of(make: Maker) -> Way:
    """How layers of this maker send what goes in and out."""
    call = make.outside(Way.call)
    return Way(make.tensor, make.deferred, make.sequence, make.transient, call)


class ColumnParallelLinear(nn.Module):
    """``x @ W.T + b`` whose outputs are cut: (B, T, in) replicated -> (B, T, own outputs).

    ``blocks`` stacks that many matrices of the same shape (keys and values), each cut alike; W is
    (blocks, out, in), or (out, in) where there is one. Cuts fall on multiples of ``unit`` (a
    head). With ``rows`` W is held whole on each rank, which uses those of its outputs only.
    """

    def __init__(
        self,
        make: Maker,
        name: str,
        in_features: int,
        out_features: int,
        *,
        std: float,
        blocks: int = 1,
        unit: int = 1,
        rows: tuple[int, int] | None = None,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.way = way_of(make)
        stack = (blocks,) if blocks > 1 else ()

        def made(kind: str, *shape: int, std: float) -> nn.Parameter:
            dim = len(stack) if rows is None else None
            return make.parameter(
                f"{name}.{kind}",
                (*stack, *shape),
                std=std,
                cut_dim=dim,
                unit=unit,
                apart=rows is not None,
            )

        weight = made("weight", out_features, in_features, std=std)
        self.weight = weight
        self.bias = made("bias", out_features, std=0.0) if bias else None
        self.rows = rows

    def forward(self, x: Tensor, length: int) -> Tensor:
        """``length`` is T; x holds this rank's piece of it under sequence parallelism."""
        return columns(x, length, self)[0]


def columns(x: Tensor, length: int, *layers: ColumnParallelLinear) -> tuple[Tensor, ...]:
    """Several layers on the same input, which travels once."""
    uses = [Use(layer.weight, layer.bias, layer.rows) for layer in layers]
    return column(x, uses, layers[0].way, length)


class RowParallelLinear(nn.Module):
    """``x @ W.T + b`` whose inputs are cut: (B, T, own inputs) -> (B, T, out) replicated.

    Under sequence parallelism (B, u, out). W is (out, in); the bias is added once.
    """

    def __init__(
        self,
        make: Maker,
        name: str,
        in_features: int,
        out_features: int,
        *,
        std: float,
        unit: int = 1,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.way = way_of(make)
        self.weight = make.parameter(
            f"{name}.weight", (out_features, in_features), std=std, cut_dim=1, unit=unit
        )
        # Its gradient is computed from what is gathered, on all ranks alike.
        self.bias = make.parameter(f"{name}.bias", (out_features,)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return row(x, Use(self.weight, self.bias), self.way)


class ReplicatedLinear(nn.Module):
    """``x @ W.T + b`` by each rank of a tensor group; of its piece of T where that is cut.

    For small layers: a split backward does not leave its weight's gradient for later.
    """

    def __init__(
        self, make: Maker, name: str, in_features: int, out_features: int, *, std: float
    ) -> None:
        super().__init__()
        apart = make.sequence
        self.weight = make.parameter(
            f"{name}.weight", (out_features, in_features), std=std, apart=apart
        )
        self.bias = make.parameter(f"{name}.bias", (out_features,), apart=apart)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class VocabParallelEmbedding(nn.Module):
    """Rows of a (V, D) table, cut over V: tokens (B, T) -> (B, T, D) replicated, or (B, u, D).

    The same table serves as output layer: (B, T, D) or (B, u, D) -> own logits (B, T, v), with
    ``bias`` where it has one.
    """

    def __init__(
        self,
        make: Maker,
        name: str,
        vocabulary: int,
        features: int,
        *,
        std: float,
        stages: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        self.way = way_of(make)
        self.vocabulary = vocabulary
        self.start, self.stop = make.cut(vocabulary)
        self.weight = make.parameter(
            f"{name}.weight", (vocabulary, features), std=std, cut_dim=0, stages=stages
        )

    @property
    def group(self) -> Group:
        return self.way.group

    def forward(self, tokens_BT: Tensor) -> Tensor:
        if self.group.size == 1:
            return F.embedding(tokens_BT, self.weight)
        local_BT = tokens_BT - self.start
        own_BT = (local_BT >= 0) & (local_BT < self.stop - self.start)
        rows_BTD = F.embedding(local_BT.where(own_BT, 0), self.weight) * own_BT.unsqueeze(-1)
        if self.way.sequence:
            return adjoints.reduce_scatter(rows_BTD, self.group, dim=1)
        return adjoints.allreduce(rows_BTD, self.group)

    def own_logits(self, x: Tensor, length: int, bias: nn.Parameter | None = None) -> Tensor:
        """Logits of this rank's piece of the vocabulary, (B, T, v), where ``length`` is T."""
        return column(x, [Use(self.weight, bias)], self.way, length)[0]

    def all_logits(self, x: Tensor, length: int, bias: nn.Parameter | None = None) -> Tensor:
        """Logits of the whole vocabulary, (B, T, V), replicated."""
        own_BTv = self.own_logits(x, length, bias)
        return adjoints.gather(own_BTv, self.group, self.vocabulary, dim=-1)

    def losses(self, x: Tensor, targets_BT: Tensor, bias: nn.Parameter | None = None) -> Tensor:
        """Cross entropy of each token in nats, (B, T), replicated."""
        own_BTv = self.own_logits(x, targets_BT.shape[1], bias)
        return vocab_parallel_cross_entropy(own_BTv, targets_BT, self.start, self.group)


@torch.no_grad()
def lay_by_columns(module: nn.Module) -> None:
    """Store wide matrices column by column, as products with a single row read them faster.

    50,257 outputs of 768 inputs, float32, one thread: 6.0 ms in place of 11.7. With four rows it is
    slower by a fifth, and so is a matrix with fewer outputs than inputs.
    """
    for layer in module.modules():
        if isinstance(layer, ColumnParallelLinear | RowParallelLinear | VocabParallelEmbedding):
            weight = layer.weight
            matrix = weight.data.flatten(0, -2)
            if matrix.shape[0] >= matrix.shape[1]:
                weight.data = matrix.t().contiguous().t().view(weight.shape)
