"""Layers cut over the tensor axis equal plain torch, outputs and gradients, cut evenly or not."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import mpmp
from mpmp.parallel.maker import Maker
from mpmp.parallel.merge import merge
from mpmp.parallel.placement import placed_parameters
from mpmp.parallel.tensor import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    vocab_parallel_cross_entropy,
)

LIMIT = 1e-13


@pytest.fixture(scope="module")
def make(world):
    return Maker(mpmp.mesh(tensor=world.size), seed=3, dtype=torch.float64)


def randn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def whole(module, make):
    """All weights of a module, and its gradients, on every rank."""
    found = []
    for kind in ("data", "grad"):
        shards = {p.name: (p, getattr(one, kind)) for p, one in placed_parameters(module)}
        merged = merge(shards, make.mesh)
        names = [p.name for p, _ in placed_parameters(module)]
        shapes = {p.name: p.shape for p, _ in placed_parameters(module)}
        found.append(
            {
                name: make.mesh.everyone.broadcast(
                    merged.get(name, torch.empty(shapes[name], dtype=torch.float64))
                )
                for name in names
            }
        )
    return found


def close(a, b):
    return float((a - b).abs().max()) <= LIMIT * max(1.0, float(b.abs().max()))


@pytest.mark.parametrize("hidden", (8, 10, 7))
@pytest.mark.parametrize("blocks", (1, 3))
def test_column_then_row_is_two_linears(make, hidden, blocks):
    column = ColumnParallelLinear(make, "up", 5, hidden, std=0.5, blocks=blocks)
    row = RowParallelLinear(make, "down", hidden, 6, std=0.5)
    for one in (*column.parameters(), *row.parameters()):
        if one.dim() == 1 or "bias" in one.placement.name:
            one.data += 0.1  # a bias of zero would hide that it is added on every rank
    x = randn(4, 5).requires_grad_()
    y = row(column(x).unflatten(-1, (blocks, -1)).sum(-2).tanh())
    grad = randn(4, 6, seed=1)
    y.backward(grad)

    weights, gradients = zip(whole(column, make), whole(row, make), strict=True)
    plain = {name: one.requires_grad_() for part in weights for name, one in part.items()}
    z = x.detach().requires_grad_()
    inner = F.linear(z, plain["up.weight"].flatten(0, -2), plain["up.bias"].flatten())
    inner = inner.unflatten(-1, (blocks, -1)).sum(-2).tanh()
    expected = F.linear(inner, plain["down.weight"], plain["down.bias"])
    expected.backward(grad)
    assert close(y, expected) and close(x.grad, z.grad)
    for part in gradients:
        for name, gradient in part.items():
            assert close(gradient, plain[name].grad), name


@pytest.mark.parametrize("vocabulary", (12, 13))
def test_embedding_and_output_layer_share_a_cut_table(make, vocabulary):
    table = VocabParallelEmbedding(make, "table", vocabulary, 4, std=1.0)
    tokens = torch.arange(vocabulary).flip(0).view(1, -1)
    targets = (tokens + 1) % vocabulary
    losses = table.token_losses(table(tokens), targets)
    losses.sum().backward()

    (weights, gradients) = whole(table, make)
    plain = weights["table.weight"].requires_grad_()
    hidden = F.embedding(tokens, plain)
    logits = F.linear(hidden, plain)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    expected.sum().backward()
    assert close(losses.flatten(), expected)
    assert close(gradients["table.weight"], plain.grad)
    assert close(table.all_logits(hidden.detach()), logits)


@pytest.mark.parametrize("scale", (1.0, 300.0), ids=("small", "large"))
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16))
def test_cross_entropy_of_cut_logits(make, scale, dtype):
    """Large logits would overflow without the maximum taken over all ranks."""
    group, vocabulary = make.tensor, 11
    logits = (randn(2, 3, vocabulary) * scale).to(dtype)
    start, stop = make.cut(vocabulary)
    own = logits[..., start:stop].contiguous().requires_grad_()
    targets = torch.tensor([[0, 5, 10], [3, 4, 9]])
    losses = vocab_parallel_cross_entropy(own, targets, start, group)
    losses.sum().backward()

    whole_logits = logits.double().requires_grad_()
    expected = F.cross_entropy(whole_logits.flatten(0, 1), targets.flatten(), reduction="none")
    expected.sum().backward()
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    assert torch.allclose(losses.double().flatten(), expected, rtol=tolerance, atol=tolerance)
    assert own.grad.dtype == dtype
    gradient = whole_logits.grad[..., start:stop]
    assert torch.allclose(own.grad.double(), gradient, rtol=tolerance, atol=tolerance)


def test_initial_weights_do_not_depend_on_the_cut(make):
    column = ColumnParallelLinear(make, "w", 6, 10, std=0.02, unit=2)
    weights = {p.name: (p, one.detach()) for p, one in placed_parameters(column)}
    merged = merge(weights, make.mesh)
    if make.mesh.world.rank == 0:
        alone = ColumnParallelLinear(
            Maker(mpmp.comm.mesh.Mesh.single(make.mesh.world), 3, torch.float64),
            "w",
            6,
            10,
            std=0.02,
        )
        assert torch.equal(merged["w.weight"], alone.weight)
        assert 0.01 < float(alone.weight.std()) < 0.03
