"""Causal attention in bfloat16 by products: as near to float64 as torch's own kernel is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mpmp.parallel.causal import causal_attention, takes


def inputs(B: int, H: int, T: int, K: int) -> list[Tensor]:
    """q, k, v as a stacked product gives them, and a gradient as the output layer gives it."""
    generator = torch.Generator().manual_seed(T)
    qkv = torch.randn(B, T, 3, H, K, generator=generator, dtype=torch.float64)
    grad = torch.randn(B, T, H, K, generator=generator, dtype=torch.float64).transpose(1, 2)
    return [*qkv.bfloat16().permute(2, 0, 3, 1, 4), grad.bfloat16()]


@pytest.mark.parametrize("shape", [(1, 1, 1, 8), (2, 3, 5, 16), (3, 2, 97, 64), (1, 2, 512, 32)])
def test_it_is_as_exact_as_the_kernel(shape: tuple[int, int, int, int]) -> None:
    *qkv, grad = inputs(*shape)
    scale = shape[-1] ** -0.5

    def errors(dtype: torch.dtype, attend: object) -> list[Tensor]:
        leaves = [one.to(dtype).detach().requires_grad_() for one in qkv]
        assert callable(attend)
        out = attend(*leaves)
        return [out, *torch.autograd.grad(out, leaves, grad.to(dtype))]

    def library(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)

    right = errors(torch.float64, library)
    found = errors(torch.bfloat16, lambda *one: causal_attention(*one, scale))
    for one, exact in zip(found, right, strict=True):
        assert one.dtype is torch.bfloat16 and one.shape == exact.shape
        error, size = (float(x.detach().norm()) for x in (one - exact, exact))
        assert error <= 8e-3 * max(size, 1e-2)


def test_it_takes_what_it_is_fast_at() -> None:
    q = torch.zeros(1, 4, 8, 16, dtype=torch.bfloat16)
    assert takes(q, q)
    assert not takes(q, q[:, :2]) and not takes(q.float(), q.float())
    long = torch.zeros(1, 1, 1024, 8, dtype=torch.bfloat16)
    assert not takes(long, long)
