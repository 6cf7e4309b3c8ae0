"""The kernels between matrix products: against their definition in torch, and in autograd."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from mpmp_kernels import layers_reference as reference
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from mpmp.parallel import causal, fused

SHAPES = [(1, 1), (1, 7), (3, 16), (5, 33), (2, 100), (4, 384), (3, 4097)]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Several threads leave the work to torch's own kernels."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert fused.has_kernels(torch.empty(0)), "there is a compiler where tests run"
    yield
    torch.set_num_threads(threads)


def values(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape) + 1000 * seed)
    return (torch.randn(*shape, generator=generator) * 2).to(dtype)


def wide(*shape: int, seed: int = 0) -> Tensor:
    return values(*shape, seed=seed, dtype=torch.float32)


def same(found: Tensor, right: Tensor, atol: float = 1e-6) -> None:
    """Equal but for the order of float32 sums, after which 16 bits may round the other way."""
    assert found.dtype is right.dtype and found.shape == right.shape
    rtol = 2**-7 if found.dtype is torch.bfloat16 else 1e-5
    torch.testing.assert_close(found, right, rtol=rtol, atol=atol)
    if found.dtype is torch.bfloat16 and found.numel() > 500:
        assert (found != right).double().mean() < 5e-3, "roundings differ by chance alone"


def graded(function: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The result, and the gradients of all inputs."""
    leaves = [one.detach().clone().requires_grad_() for one in inputs]
    out = function(*leaves)
    grad = values(*out.shape, seed=9).to(out.dtype)
    return out.detach(), torch.autograd.grad(out, leaves, grad)


@pytest.mark.parametrize("shape", SHAPES)
def test_gelu(shape: tuple[int, int]) -> None:
    x = values(*shape)
    y, (x_grad,) = graded(fused.gelu_tanh, x)
    same(y, reference.gelu(x))
    same(x_grad, reference.gelu_backward(x, values(*shape, seed=9)), atol=1e-5)


def test_gelu_of_all_sixteen_bit_numbers() -> None:
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)
    x = x[x.isfinite()]
    y, right = (
        fused.gelu_tanh(x),
        x.double()
        * torch.sigmoid(2 * (2 / torch.pi) ** 0.5 * (x.double() + 0.044715 * x.double() ** 3)),
    )
    normal = right.abs() > 1e-37
    torch.testing.assert_close(y[normal].double(), right[normal], rtol=2**-8, atol=0)
    assert (y[~normal].abs() < 1e-36).all()
    assert fused.gelu_tanh(torch.tensor([float("nan")]).bfloat16()).isnan().all()


@pytest.mark.parametrize("shape", SHAPES)
def test_add(shape: tuple[int, int]) -> None:
    x, branch = wide(*shape), values(*shape, seed=1)
    total, (x_grad, branch_grad) = graded(fused.add, x, branch)
    assert torch.equal(total, reference.add(x, branch))
    assert torch.equal(branch_grad, x_grad.bfloat16()) and branch_grad.dtype is torch.bfloat16


@pytest.mark.parametrize("shape", SHAPES)
def test_layer_norm(shape: tuple[int, int]) -> None:
    x, weight, bias = wide(*shape) + 3, wide(shape[1], seed=1), wide(shape[1], seed=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, grads = graded(lambda *args: fused.layer_norm(*args, 1e-5), x, weight, bias)
    right, mean, rstd = reference.layer_norm(x, weight, bias, 1e-5)
    if shape[1] > 1:  # the deviation of one number is nothing but rounding
        same(y, right, atol=1e-5)
        y_grad = values(*shape, seed=9)
        found = reference.layer_norm_backward(y_grad, x, weight, mean, rstd)
        for one, other in zip(grads, found, strict=True):
            same(one, other, atol=2e-4)


@pytest.mark.parametrize("shape", [(1, 1), (2, 5), (3, 16), (2, 97), (1, 300)])
def test_causal_softmax(shape: tuple[int, int]) -> None:
    h, T = shape
    scores, grad = values(h, T, T) * 4, values(h, T, T, seed=1)
    weights = fused.causal_softmax_(scores.clone(), 0.3)
    same(weights, reference.causal_softmax(scores, 0.3), atol=1e-7)
    assert (weights.triu(1) == 0).all()
    found = fused.causal_softmax_backward_(weights, grad.clone(), 0.3)
    same(found, reference.causal_softmax_backward(weights, grad, 0.3), atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_passes_over_logits(shape: tuple[int, int]) -> None:
    logits = values(*shape)
    passes = fused.CrossEntropy.of(logits)
    assert passes is not None
    most = passes.maximum()
    assert torch.equal(most, reference.maximum(logits))
    total = passes.exponentials(most)
    same(total, reference.exponentials(logits, most))
    target = torch.arange(len(logits)) * 3 - 1  # some outside
    scale, lse = wide(len(logits), seed=3), most + total.log()
    found = passes.backward(lse, scale, target)
    same(found, reference.cross_entropy_backward(logits, lse, scale, target))


def test_what_is_not_finite_is_seen() -> None:
    logits = values(3, 50)
    logits[0, 7], logits[1, 7], logits[2, 7] = float("nan"), float("inf"), float("-inf")
    passes = fused.CrossEntropy.of(logits)
    assert passes is not None
    totals = passes.exponentials(passes.maximum())
    assert totals[0].isnan() and totals[1].isnan() and totals[2].isfinite()
    x = wide(2, 8)
    x[0, 3] = float("nan")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = fused.layer_norm(x, torch.ones(8), torch.zeros(8), 1e-5)
    assert y[0].isnan().all() and y[1].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_types_are_torchs(dtype: torch.dtype) -> None:
    x, weight, bias = (values(*shape, dtype=dtype) for shape in ((3, 8), (8,), (8,)))
    assert torch.equal(fused.gelu_tanh(x), F.gelu(x, approximate="tanh"))
    assert torch.equal(fused.add(x, x), x + x)
    right = F.layer_norm(x, (8,), weight, bias, 1e-5)
    assert torch.equal(fused.layer_norm(x, weight, bias, 1e-5), right)
    assert fused.CrossEntropy.of(x) is None


def test_views_that_are_not_in_one_piece_are_torchs() -> None:
    x = values(8, 8).t()
    assert torch.equal(fused.gelu_tanh(x), F.gelu(x, approximate="tanh"))
    assert torch.equal(fused.add(x.float(), x), x.float() + x)
    assert fused.CrossEntropy.of(x) is None


def test_tensors_of_a_dry_run_have_no_memory() -> None:
    with FakeTensorMode():
        x = torch.empty(3, 2, 8, 8, dtype=torch.bfloat16, requires_grad=True)
        mixed = causal.causal_attention(x, x, x, 1.0)
        fused.add(mixed.float(), fused.gelu_tanh(mixed)).sum().backward()  # type: ignore[no-untyped-call]
        assert fused.CrossEntropy.of(x) is None
    assert x.grad is not None and x.grad.shape == x.shape


def test_several_threads_are_torchs() -> None:
    torch.set_num_threads(2)
    assert not fused.has_kernels(torch.empty(0))


@pytest.mark.parametrize("shape", SHAPES)
def test_adding_in_place(shape: tuple[int, int]) -> None:
    total, part = wide(*shape), values(*shape, seed=1)
    right = total + part
    version = total._version
    fused.add_(total, part)
    assert torch.equal(total, right) and total._version > version
    fused.add_(total, part.float())
    assert torch.equal(total, right + part)
