"""Cross entropy of logits that are cut over the vocabulary (Shoeybi et al. 2019, section 3).

Only two numbers a token travel twice, its maximum, then its sum of exponentials and its target's
logit, in place of V logits.

Shapes: B batch, T time, V vocabulary; v is this rank's piece of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mpmp.comm.group import Group
from mpmp.parallel.fused import CrossEntropy
from mpmp.parallel.stage import NOT_COUNTED

_ROWS = 64
"""Tokens whose logits are widened at once on a CPU."""


def vocab_parallel_cross_entropy(
    logits_BTv: Tensor, targets_BT: Tensor, start: int, group: Group
) -> Tensor:
    """Cross entropy of each token in nats, (B, T), from logits cut from ``start`` on.

    Zero where the target is NOT_COUNTED; float32 at least, and the same on every rank. Kept for
    backward are the logits as they are, and a number a token.
    """
    loss: Tensor = _CrossEntropy.apply(logits_BTv, targets_BT, start, group)  # type: ignore[no-untyped-call]
    return loss


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits_BTv: Tensor, targets_BT: Tensor, start: int, group: Group
    ) -> Tensor:
        logits_Nv, targets_N = logits_BTv.detach().flatten(0, 1), targets_BT.flatten()
        wide = torch.promote_types(logits_Nv.dtype, torch.float32)
        fast = CrossEntropy.of(logits_Nv)
        maximum_N = logits_Nv.amax(-1).to(wide) if fast is None else fast.maximum()
        maximum_N = group.allreduce(maximum_N, op="max")
        if fast is None:
            total_N = _exponentials(logits_Nv, maximum_N)
        else:
            total_N = fast.exponentials(maximum_N)
        local_N = targets_N - start
        own_N = (local_N >= 0) & (local_N < logits_Nv.shape[1])
        local_N1 = local_N.where(own_N, 0).unsqueeze(-1)
        target_N = (logits_Nv.gather(-1, local_N1).squeeze(-1).to(wide) - maximum_N) * own_N
        total_N, target_N = group.allreduce(torch.stack((total_N, target_N)))
        counted_N = targets_N != NOT_COUNTED
        ctx.save_for_backward(logits_BTv, maximum_N + total_N.log(), local_N1, own_N, counted_N)
        losses: Tensor = (total_N.log() - target_N) * counted_N
        return losses.view(targets_BT.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BT: Tensor) -> tuple[Tensor, None, None, None]:
        logits_BTv, lse_N, local_N1, own_N, counted_N = ctx.saved_tensors
        logits_Nv, grad_N = logits_BTv.flatten(0, 1), grad_BT.flatten() * counted_N
        fast = CrossEntropy.of(logits_Nv)
        if fast is not None:
            target_N = local_N1.squeeze(-1).where(own_N, -1)
            return fast.backward(lse_N, grad_N, target_N).view_as(logits_BTv), None, None, None
        grad_Nv = torch.empty_like(logits_Nv)
        for piece in _pieces(logits_Nv):
            scores = logits_Nv[piece].to(lse_N.dtype, copy=True).sub_(lse_N[piece, None])
            softmax = scores.exp_().mul_(grad_N[piece, None])
            # softmax - one-hot(target); the target's column lies on one rank alone.
            own = (-grad_N[piece] * own_N[piece]).unsqueeze(-1)
            grad_Nv[piece] = softmax.scatter_add_(-1, local_N1[piece], own)
        return grad_Nv.view_as(logits_BTv), None, None, None


def _exponentials(logits_Nv: Tensor, maximum_N: Tensor) -> Tensor:
    """Their sums, over e^maximum."""
    total_N = torch.empty_like(maximum_N)
    for piece in _pieces(logits_Nv):
        scores = logits_Nv[piece].to(maximum_N.dtype, copy=True).sub_(maximum_N[piece, None])
        total_N[piece] = scores.exp_().sum(-1)
    return total_N


def _pieces(logits_Nv: Tensor) -> Iterator[slice]:
    """Rows in pieces whose wide copies stay in a processor's cache; a GPU takes all at once."""
    rows = _ROWS if logits_Nv.is_cpu else max(1, len(logits_Nv))
    return (slice(at, at + rows) for at in range(0, len(logits_Nv), rows))
