"""The definition of the kernels of layers.c, in plain torch.

All take bfloat16 of products and float32 of hidden states, compute in float32 and round once.

Shapes: N rows, D features, V logits; h heads, T queries and keys.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def gelu(x: Tensor) -> Tensor:
    """In float64: in float32 torch's 1 + tanh cancels, the kernel's logistic function does not."""
    return F.gelu(x.double(), approximate="tanh").bfloat16()


def gelu_backward(x: Tensor, y_grad: Tensor) -> Tensor:
    leaf = x.double().requires_grad_()
    (found,) = torch.autograd.grad(F.gelu(leaf, approximate="tanh"), leaf, y_grad.double())
    return found.bfloat16()


def add(x: Tensor, branch: Tensor) -> Tensor:
    return x + branch.float()


def layer_norm(
    x_ND: Tensor, weight: Tensor, bias: Tensor, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The result, and of each row the mean and the inverse of the deviation."""
    mean_N = x_ND.mean(-1)
    rstd_N = (x_ND.var(-1, correction=0) + epsilon).rsqrt()
    normed_ND = (x_ND - mean_N[:, None]) * rstd_N[:, None]
    return (normed_ND * weight + bias).bfloat16(), mean_N, rstd_N


def layer_norm_backward(
    y_grad_ND: Tensor, x_ND: Tensor, weight: Tensor, mean_N: Tensor, rstd_N: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias."""
    normed_ND = (x_ND - mean_N[:, None]) * rstd_N[:, None]
    y_grad_ND = y_grad_ND.float()
    grad_ND = y_grad_ND * weight
    level_N1 = grad_ND.mean(-1, keepdim=True)
    along_N1 = (grad_ND * normed_ND).mean(-1, keepdim=True)
    x_grad_ND = (grad_ND - level_N1 - normed_ND * along_N1) * rstd_N[:, None]
    return x_grad_ND, (y_grad_ND * normed_ND).sum(0), y_grad_ND.sum(0)


def causal_softmax(scores_hTT: Tensor, scale: float) -> Tensor:
    """Weights; a query sees no later key."""
    later_TT = torch.ones(scores_hTT.shape[-2:], dtype=torch.bool).triu(1)
    scores_hTT = scores_hTT.float().masked_fill(later_TT, float("-inf")) * scale
    return scores_hTT.softmax(-1).bfloat16()


def causal_softmax_backward(weights_hTT: Tensor, grad_hTT: Tensor, scale: float) -> Tensor:
    """Gradients of the scores from those of the weights."""
    weights_hTT, grad_hTT = weights_hTT.float(), grad_hTT.float()
    inner_hT1 = (weights_hTT * grad_hTT).tril().sum(-1, keepdim=True)
    return (weights_hTT * (grad_hTT - inner_hT1) * scale).tril().bfloat16()


def maximum(logits_NV: Tensor) -> Tensor:
    return logits_NV.float().amax(-1)


def exponentials(logits_NV: Tensor, maximum_N: Tensor) -> Tensor:
    """Their sums, over e^maximum."""
    return (logits_NV.float() - maximum_N[:, None]).exp().sum(-1)


def cross_entropy_backward(
    logits_NV: Tensor, lse_N: Tensor, scale_N: Tensor, target_N: Tensor
) -> Tensor:
    """Of the sum of losses times ``scale``; a target may be outside of the row."""
    grad_NV = (logits_NV.float() - lse_N[:, None]).exp() * scale_N[:, None]
    own_N = (target_N >= 0) & (target_N < logits_NV.shape[1])
    grad_NV[own_N, target_N[own_N]] -= scale_N[own_N]
    return grad_NV.bfloat16()
