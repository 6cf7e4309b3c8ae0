"""Layers cut over the tensor axis (Shoeybi et al. 2019, section 3).

    x (replicated) --replicate--> ColumnParallelLinear -> own heads or hidden units
                                  RowParallelLinear    --allreduce--> y (replicated)

One allreduce in each direction for a pair of layers. What does not divide is cut unevenly.

Shapes: B batch, T time, D model, V vocabulary; a small letter is this rank's piece of it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mpmp.comm.group import Group
from mpmp.parallel import adjoints
from mpmp.parallel.maker import Maker


class ColumnParallelLinear(nn.Module):
    """``x @ W.T + b`` whose outputs are cut: (..., in) replicated -> (..., own outputs).

    ``blocks`` stacks that many matrices of the same shape (queries, keys and values), each cut
    alike; W is (blocks, out, in), or (out, in) where there is one. Cuts fall on multiples of
    ``unit`` (a head).
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
    ) -> None:
        super().__init__()
        self.group = make.tensor
        stack, dim = ((blocks,), 1) if blocks > 1 else ((), 0)
        self.weight = make.parameter(
            f"{name}.weight", (*stack, out_features, in_features), std=std, cut_dim=dim, unit=unit
        )
        self.bias = make.parameter(f"{name}.bias", (*stack, out_features), cut_dim=dim, unit=unit)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.flatten(0, -2)
        return adjoints.replicate_linear(x, weight, self.bias.flatten(), self.group)


class RowParallelLinear(nn.Module):
    """``x @ W.T + b`` whose inputs are cut: (..., own inputs) -> (..., out) replicated.

    W is (out, in); the bias is added once, after the sum over the group.
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
    ) -> None:
        super().__init__()
        self.group = make.tensor
        self.weight = make.parameter(
            f"{name}.weight", (out_features, in_features), std=std, cut_dim=1, unit=unit
        )
        self.bias = make.parameter(f"{name}.bias", (out_features,))

    def forward(self, x: Tensor) -> Tensor:
        return adjoints.linear_allreduce(x, self.weight, self.group) + self.bias


class VocabParallelEmbedding(nn.Module):
    """Rows of a (V, D) table, cut over V: tokens (B, T) -> (B, T, D) replicated.

    The same table serves as output layer: (B, T, D) replicated -> own logits (B, T, v).
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
        self.group = make.tensor
        self.vocabulary = vocabulary
        self.start, self.stop = make.cut(vocabulary)
        self.weight = make.parameter(
            f"{name}.weight", (vocabulary, features), std=std, cut_dim=0, stages=stages
        )

    def forward(self, tokens_BT: Tensor) -> Tensor:
        local_BT = tokens_BT - self.start
        own_BT = (local_BT >= 0) & (local_BT < self.stop - self.start)
        rows_BTD = F.embedding(local_BT.where(own_BT, 0), self.weight)
        return adjoints.allreduce(rows_BTD * own_BT.unsqueeze(-1), self.group)

    def own_logits(self, x_BTD: Tensor) -> Tensor:
        """Logits of this rank's piece of the vocabulary, (B, T, v)."""
        return adjoints.replicate_linear(x_BTD, self.weight, None, self.group)

    def all_logits(self, x_BTD: Tensor) -> Tensor:
        """Logits of the whole vocabulary, (B, T, V), replicated."""
        return adjoints.gather(self.own_logits(x_BTD), self.group, self.vocabulary, dim=-1)

    def token_losses(self, x_BTD: Tensor, targets_BT: Tensor) -> Tensor:
        """Cross entropy of each token in nats, (B, T), replicated."""
        return vocab_parallel_cross_entropy(
            self.own_logits(x_BTD), targets_BT, self.start, self.group
        )


def vocab_parallel_cross_entropy(
    logits_BTv: Tensor, targets_BT: Tensor, start: int, group: Group
) -> Tensor:
    """Cross entropy of each token, from logits that are cut over the vocabulary from ``start`` on.

    Only two numbers a token travel twice (its maximum; its sum of exponentials and its target's
    logit) in place of V logits. Returns nats, (B, T), float32 at least, the same on every rank.
    """
    loss: Tensor = _CrossEntropy.apply(logits_BTv, targets_BT, start, group)  # type: ignore[no-untyped-call]
    return loss


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits_BTv: Tensor, targets_BT: Tensor, start: int, group: Group
    ) -> Tensor:
        wide = torch.promote_types(logits_BTv.dtype, torch.float32)
        scores_BTv = logits_BTv.detach().to(wide)
        maximum_BT = group.allreduce(scores_BTv.amax(-1), op="max")
        scores_BTv = scores_BTv - maximum_BT.unsqueeze(-1)
        local_BT = targets_BT - start
        own_BT = (local_BT >= 0) & (local_BT < scores_BTv.shape[-1])
        local_BT = local_BT.where(own_BT, 0)
        target_BT = scores_BTv.gather(-1, local_BT.unsqueeze(-1)).squeeze(-1) * own_BT
        exponentials_BTv = scores_BTv.exp()
        sums = group.allreduce(torch.stack((exponentials_BTv.sum(-1), target_BT)))
        total_BT, target_BT = sums[0], sums[1]
        ctx.save_for_backward(exponentials_BTv / total_BT.unsqueeze(-1), local_BT, own_BT)
        ctx.dtype = logits_BTv.dtype
        return total_BT.log() - target_BT

    @staticmethod
    def backward(ctx: Any, grad_BT: Tensor) -> tuple[Tensor, None, None, None]:
        softmax_BTv: Tensor
        softmax_BTv, local_BT, own_BT = ctx.saved_tensors
        # softmax - one-hot(target); the target's column lies on one rank alone.
        hit_BT = own_BT.to(softmax_BTv.dtype).unsqueeze(-1)
        grad_BTv = softmax_BTv.scatter_add(-1, local_BT.unsqueeze(-1), -hit_BT)
        grad_BTv = grad_BTv * grad_BT.unsqueeze(-1)
        return grad_BTv.to(ctx.dtype), None, None, None
