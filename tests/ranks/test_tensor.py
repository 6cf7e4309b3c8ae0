"""Layers cut over the tensor axis equal plain torch, outputs and gradients, cut evenly or not."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import mpmp
from mpmp.comm.mesh import Mesh
from mpmp.config import Comm
from mpmp.parallel import beside
from mpmp.parallel.cross_entropy import vocab_parallel_cross_entropy
from mpmp.parallel.maker import Maker
from mpmp.parallel.merge import merge
from mpmp.parallel.placement import placed_parameters
from mpmp.parallel.stage import NOT_COUNTED
from mpmp.parallel.tensor import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    columns,
)
from mpmp.programs.partition import partition

LIMIT, TIME = 1e-13, 7


@pytest.fixture(scope="module")
def mesh(world):
    return mpmp.mesh(tensor=world.size)


@pytest.fixture(scope="module")
def talking(world):
    """A mesh whose ranks send messages, beside products."""
    return Mesh.over(world, tensor=world.size, settings=Comm(windows="off", overlap="on"))


@pytest.fixture(params=(False, True), ids=("whole", "pieces"))
def make(mesh, request):
    return Maker(mesh, seed=3, dtype=torch.float64, sequence=request.param)


@pytest.fixture(params=("whole", "pieces", "whole beside", "pieces beside"))
def make_each_way(mesh, talking, request, monkeypatch):
    """What moves between layers moves at once, or beside products in several pieces."""
    how, _, beside_products = request.param.partition(" ")
    monkeypatch.setattr(beside, "LEAST_BYTES", 1)
    chosen = talking if beside_products else mesh
    return Maker(chosen, seed=3, dtype=torch.float64, sequence=how == "pieces")


def randn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def whole(module, make):
    """All weights of a module, and its gradients (summed as buckets would), on every rank."""
    found = []
    for kind in ("data", "grad"):
        shards = {}
        for placement, one in placed_parameters(module):
            tensor = getattr(one, kind).contiguous()
            if kind == "grad":
                tensor = make.mesh.sum_group(placement).allreduce(tensor)
            shards[placement.name] = placement, tensor
        merged = merge(shards, make.mesh)
        found.append({})
        for name, (placement, _) in shards.items():
            there = merged.get(name, torch.empty(placement.shape, dtype=torch.float64))
            found[-1][name] = make.mesh.everyone.broadcast(there)
    return found


def piece(x, make):
    """What this rank holds of (B, T, ...) between cut layers."""
    if not make.sequence:
        return x
    start, stop = partition(x.shape[1], make.tensor.size)[make.tensor.rank]
    return x[:, start:stop].contiguous()


def close(a, b):
    return float((a - b).abs().max()) <= LIMIT * max(1.0, float(b.abs().max()))


@pytest.mark.parametrize("bias", (True, False), ids=("bias", "none"))
@pytest.mark.parametrize("hidden", (8, 7))
@pytest.mark.parametrize("blocks", (1, 3))
def test_column_then_row_is_two_linears(make_each_way, hidden, blocks, bias):
    make = make_each_way
    column = ColumnParallelLinear(make, "up", 5, hidden, std=0.5, blocks=blocks, bias=bias)
    row = RowParallelLinear(make, "down", hidden, 6, std=0.5, bias=bias)
    for one in (*column.parameters(), *row.parameters()):
        if "bias" in one.placement.name:
            one.data += 0.1  # a bias of zero would hide that it is added on every rank
    x = randn(2, TIME, 5)
    own = piece(x, make).requires_grad_()
    y = row(column(own, TIME).unflatten(-1, (blocks, -1)).sum(-2).tanh())
    grad = randn(2, TIME, 6, seed=1)
    y.backward(piece(grad, make))

    weights, gradients = zip(whole(column, make), whole(row, make), strict=True)
    plain = {name: one.requires_grad_() for part in weights for name, one in part.items()}
    x.requires_grad_()
    first, last = plain.get("up.bias"), plain.get("down.bias")
    inner = F.linear(
        x, plain["up.weight"].flatten(0, -2), first if first is None else first.flatten()
    )
    inner = inner.unflatten(-1, (blocks, -1)).sum(-2).tanh()
    expected = F.linear(inner, plain["down.weight"], last)
    expected.backward(grad)
    assert close(y, piece(expected, make)) and close(own.grad, piece(x.grad, make))
    for part in gradients:
        for name, gradient in part.items():
            assert close(gradient, plain[name].grad), name


def test_no_tokens_at_all(make_each_way):
    """As a context rank has them of a short sequence."""
    column = ColumnParallelLinear(make_each_way, "up", 5, 8, std=0.5)
    row = RowParallelLinear(make_each_way, "down", 8, 6, std=0.5)
    x = randn(2, 0, 5).requires_grad_()
    y = row(column(x, 0))
    y.sum().backward()
    assert y.shape == (2, 0, 6) and x.grad.shape == x.shape
    assert not column.weight.grad.any() and not row.weight.grad.any()


def test_what_is_generated_moves_at_once(make_each_way):
    """Another thread may not change tensors of inference mode."""
    row = RowParallelLinear(make_each_way, "down", 8, 6, std=0.5)
    start, stop = make_each_way.cut(8)
    x = randn(2, TIME, 8)
    expected = row(x[..., start:stop]).detach()
    with torch.inference_mode():
        found = row(x[..., start:stop])
    assert close(found, expected)


def test_rows_of_a_weight_that_is_whole_on_all_ranks(make):
    """As of KV heads that several ranks read: each rank's gradient is a part of the whole's."""
    rank, size = make.tensor.rank, make.tensor.size
    rows = (min(rank, 2), min(rank, 2) + 2)  # ranks share rows
    layer = ColumnParallelLinear(make, "kv", 3, 4, std=0.5, blocks=2, rows=rows)
    x = randn(1, TIME, 3)
    own = piece(x, make).requires_grad_()
    layer(own, TIME).sum().backward()
    (weights, gradients) = whole(layer, make)
    weight, bias = (weights[f"kv.{kind}"].requires_grad_() for kind in ("weight", "bias"))
    x.requires_grad_()
    for one in range(size):
        start = min(one, 2)
        used = weight[:, start : start + 2].flatten(0, -2), bias[:, start : start + 2].flatten()
        F.linear(x, *used).sum().backward()
    assert close(own.grad, piece(x.grad, make))
    assert close(gradients["kv.weight"], weight.grad) and close(gradients["kv.bias"], bias.grad)


def test_several_layers_on_one_input(make):
    layers = [ColumnParallelLinear(make, name, 3, 5, std=0.5) for name in ("a", "b")]
    own = piece(randn(2, TIME, 3), make).requires_grad_()
    (apart,) = torch.autograd.grad(sum(layer(own, TIME).sin().sum() for layer in layers), own)
    together = sum(one.sin().sum() for one in columns(own, TIME, *layers))
    (found,) = torch.autograd.grad(together, own)
    assert close(found, apart)


@pytest.mark.parametrize("vocabulary", (12, 13))
def test_embedding_and_output_layer_share_a_cut_table(make, vocabulary):
    table = VocabParallelEmbedding(make, "table", vocabulary, 4, std=1.0)
    tokens = torch.arange(vocabulary).flip(0).view(1, -1)
    targets = (tokens + 1) % vocabulary
    targets[0, 3] = NOT_COUNTED
    losses = table.losses(table(tokens), targets)
    losses.sum().backward()

    (weights, gradients) = whole(table, make)
    plain = weights["table.weight"].requires_grad_()
    hidden = F.embedding(tokens, plain)
    logits = F.linear(hidden, plain)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    expected.sum().backward()
    assert close(losses.flatten(), expected) and float(losses[0, 3]) == 0
    assert close(gradients["table.weight"], plain.grad)
    assert close(table.all_logits(piece(hidden.detach(), make), vocabulary), logits)


@pytest.mark.parametrize("scale", (1.0, 300.0), ids=("small", "large"))
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16))
def test_cross_entropy_of_cut_logits(mesh, scale, dtype):
    """Large logits would overflow without the maximum taken over all ranks."""
    group, vocabulary = mesh.tensor, 11
    logits = (randn(2, 3, vocabulary) * scale).to(dtype)
    start, stop = partition(vocabulary, group.size)[group.rank]
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
