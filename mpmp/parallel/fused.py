"""What a block does between its matrix products, in one pass over memory each.

    x float32 --norm--> bf16 --product--> bf16 --gelu--> bf16 --product--> bf16 --add--> x float32

torch's own take several passes, with copies between them where types differ. Ours are in C
(``kernels/mpmp_kernels/layers.c``), for bfloat16 on one thread of a CPU; everywhere else these
functions are torch's. What is kept for backward is the same.

Shapes: N rows (tokens), D features, v logits of this rank.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from mpmp.comm.lane import kernels


def has_kernels(x: Tensor) -> bool:
    """Whether there are kernels for bfloat16 where a tensor lies, and they are the faster way."""
    return (
        x.device.type == "cpu"
        and not isinstance(x, FakeTensor)  # a dry run's, which has no memory
        and torch.get_num_threads() == 1  # torch's share their work out over several
        and not torch.compiler.is_compiling()
        and kernels() is not None
    )


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU by tanh (Hendrycks and Gimpel 2016)."""
    if _kernels(x, bf16=True) is None:
        return F.gelu(x, approximate="tanh")
    return _apply(_Gelu, x)


def add(x: Tensor, branch: Tensor) -> Tensor:
    """A residual and its branch."""
    alike = x.shape == branch.shape and x.dtype is torch.float32
    if not alike or _kernels(branch, bf16=True) is None or not x.is_contiguous():
        return x + branch
    return _apply(_Add, x, branch)


def add_(total: Tensor, part: Tensor) -> None:
    """Add to a sum in its place."""
    alike = total.shape == part.shape and total.dtype is torch.float32
    if not alike or _kernels(part, bf16=True) is None or not total.is_contiguous():
        total += part
        return
    _library().mpmp_add(total.numel(), *_at(total, part, total))
    torch.autograd.graph.increment_version(total)  # autograd does not see what C stores


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
    """LayerNorm (Ba et al. 2016) whose result products alone take, in their type where it pays."""
    narrow = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") is torch.bfloat16
    if not narrow or x.dtype is not torch.float32 or _kernels(x) is None:
        return F.layer_norm(x, weight.shape, weight, bias, epsilon)
    return _apply(_LayerNorm, x, weight, bias, epsilon)


def causal_softmax_(scores_hTT: Tensor, scale: float) -> Tensor:
    """Weights, in the scores' memory; a query sees no later key. See ``has_kernels``."""
    h, T, _ = scores_hTT.shape
    _library().mpmp_causal_softmax(h, T, scale, *_at(scores_hTT))
    return scores_hTT


def causal_softmax_backward_(weights_hTT: Tensor, grad_hTT: Tensor, scale: float) -> Tensor:
    """Gradients of the scores, in the memory of those of the weights."""
    h, T, _ = weights_hTT.shape
    _library().mpmp_causal_softmax_backward(h, T, scale, *_at(weights_hTT, grad_hTT))
    return grad_hTT


class CrossEntropy:
    """The passes over logits (N, v) that cross entropy makes."""

    def __init__(self, found: ctypes.CDLL, logits_Nv: Tensor) -> None:
        self._found, self._logits = found, logits_Nv

    @classmethod
    def of(cls, logits_Nv: Tensor) -> CrossEntropy | None:
        """None where there is no kernel for these."""
        found = _kernels(logits_Nv, bf16=True)
        return None if found is None else cls(found, logits_Nv)

    def maximum(self) -> Tensor:
        out_N = self._logits.new_empty(len(self._logits), dtype=torch.float32)
        self._found.mpmp_maximum(*self._logits.shape, *_at(self._logits, out_N))
        return out_N

    def exponentials(self, maximum_N: Tensor) -> Tensor:
        """Their sums, over e^maximum."""
        out_N = torch.empty_like(maximum_N)
        tensors = self._logits, maximum_N, out_N
        self._found.mpmp_exponentials(*self._logits.shape, *_at(*tensors))
        return out_N

    def backward(self, lse_N: Tensor, scale_N: Tensor, target_N: Tensor) -> Tensor:
        """Of the sum of losses times ``scale``; a target may lie on another rank."""
        grad_Nv = torch.empty_like(self._logits)
        tensors = self._logits, lse_N, scale_N.float().contiguous(), target_N, grad_Nv
        self._found.mpmp_cross_entropy_backward(*self._logits.shape, *_at(*tensors))
        return grad_Nv


# --- inside ---------------------------------------------------------------------------------------


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        y = torch.empty_like(x)
        _library().mpmp_gelu(x.numel(), *_at(x, y))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        grad, x_grad = grad.contiguous(), torch.empty_like(x)
        _library().mpmp_gelu_backward(x.numel(), *_at(x, grad, x_grad))
        return x_grad


class _Add(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, branch: Tensor) -> Tensor:
        total = torch.empty_like(x)
        _library().mpmp_add(x.numel(), *_at(x, branch, total))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, grad.bfloat16()


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
        D = x.shape[-1]
        N = x.numel() // D
        y, mean_N = torch.empty_like(x, dtype=torch.bfloat16), x.new_empty(N)
        rstd_N = torch.empty_like(mean_N)
        before, after = _at(x, weight, bias), _at(y, mean_N, rstd_N)
        _library().mpmp_layer_norm(N, D, *before, epsilon, *after)
        ctx.save_for_backward(x, weight, mean_N, rstd_N)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, mean_N, rstd_N = ctx.saved_tensors
        x_grad, weight_grad = torch.empty_like(x), torch.zeros_like(weight)
        bias_grad = torch.zeros_like(weight)
        tensors = grad.contiguous(), x, weight, mean_N, rstd_N, x_grad, weight_grad, bias_grad
        _library().mpmp_layer_norm_backward(len(mean_N), x.shape[-1], *_at(*tensors))
        return x_grad, weight_grad, bias_grad, None


def _kernels(x: Tensor, bf16: bool = False) -> ctypes.CDLL | None:
    """The compiled kernels, where they are the faster way for this tensor."""
    fits = (not bf16 or x.dtype is torch.bfloat16) and x.is_contiguous() and x.numel() > 0
    return kernels() if fits and has_kernels(x) else None


def _library() -> ctypes.CDLL:
    found = kernels()
    assert found is not None, "asked for before"
    return found


def _at(*tensors: Tensor) -> list[int]:
    return [one.data_ptr() for one in tensors]


def _apply(function: type[torch.autograd.Function], *arguments: Any) -> Tensor:
    result: Tensor = function.apply(*arguments)  # type: ignore[no-untyped-call]
    return result
