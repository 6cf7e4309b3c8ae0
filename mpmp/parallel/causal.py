"""Causal attention in bfloat16 on a CPU, by matrix products.

The processor's matrix unit takes whole scores of a sequence faster than torch's kernel takes its
blocks. The scores of one sequence at a time are there, rounded to 16 bits before their softmax, and
nothing but q, k and v is kept. Where our softmax cannot run forward is torch's kernel.

Shapes: B batch, T time, K head width; h own heads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from mpmp.parallel import fused

_LONGEST = 512
"""Tokens: beyond that the half that nobody sees, which the kernel leaves out, costs more."""


def takes(q_BhTK: Tensor, k_BhTK: Tensor) -> bool:
    """Whether this is the faster way."""
    return (
        q_BhTK.dtype is torch.bfloat16
        and q_BhTK.device.type == "cpu"
        and q_BhTK.shape == k_BhTK.shape
        and q_BhTK.shape[2] <= _LONGEST
        and not torch.compiler.is_compiling()
    )


def causal_attention(q_BhTK: Tensor, k_BhTK: Tensor, v_BhTK: Tensor, scale: float) -> Tensor:
    """Each head's mixture of the values that its queries see, (B, h, T, K)."""
    mixed: Tensor = _Causal.apply(q_BhTK, k_BhTK, v_BhTK, scale)  # type: ignore[no-untyped-call]
    return mixed


class _Causal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.scale = scale
        if not fused.has_kernels(q):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        out = torch.empty_like(q)
        for q_hTK, k_hTK, v_hTK, out_hTK in zip(q, k, v, out, strict=True):
            torch.bmm(_weights(q_hTK, k_hTK.contiguous(), scale), v_hTK.contiguous(), out=out_hTK)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        grads = [torch.empty_like(one) for one in ctx.saved_tensors]
        for *strided, q_grad, k_grad, v_grad in zip(*ctx.saved_tensors, grad, *grads, strict=True):
            # Each is used twice or three times, and products of what lies in one piece are faster.
            q_hTK, k_hTK, v_hTK, grad_hTK = (one.contiguous() for one in strided)
            weights_hTT = _weights(q_hTK, k_hTK, ctx.scale)
            torch.bmm(weights_hTT.mT, grad_hTK, out=v_grad)
            weights_grad_hTT = torch.bmm(grad_hTK, v_hTK.mT)
            scores_grad_hTT = _scores_gradient(weights_hTT, weights_grad_hTT, ctx.scale)
            torch.bmm(scores_grad_hTT, k_hTK, out=q_grad)
            torch.bmm(scores_grad_hTT.mT, q_hTK, out=k_grad)
        return grads[0], grads[1], grads[2], None


def _weights(q_hTK: Tensor, k_hTK: Tensor, scale: float) -> Tensor:
    """What each query takes of each key's value, (h, T, T)."""
    scores_hTT = torch.bmm(q_hTK, k_hTK.mT)
    if fused.has_kernels(q_hTK):
        return fused.causal_softmax_(scores_hTT, scale)
    later_TT = torch.full(scores_hTT.shape[1:], float("-inf"), dtype=q_hTK.dtype).triu_(1)
    return scores_hTT.mul_(scale).add_(later_TT).softmax(-1)


def _scores_gradient(weights_hTT: Tensor, grad_hTT: Tensor, scale: float) -> Tensor:
    if fused.has_kernels(grad_hTT):
        return fused.causal_softmax_backward_(weights_hTT, grad_hTT, scale)
    found: Tensor = torch.ops.aten._softmax_backward_data(grad_hTT, weights_hTT, -1, grad_hTT.dtype)
    return found.mul_(scale)
