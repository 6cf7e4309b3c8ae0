"""The GPT against its one-file reference, and what may not depend on the layout."""

from __future__ import annotations

import pytest
import torch

import mpmp
from mpmp import config
from mpmp.comm.mesh import Mesh
from mpmp.errors import LayoutError
from mpmp.models.gpt import GPTStage
from mpmp.models.gpt_reference import ReferenceGPT
from mpmp.optim.clip import clip_, global_norm
from mpmp.parallel.merge import digest, merge
from mpmp.parallel.placement import placed_parameters

SHAPE = config.Model(layers=3, heads=4, width=16, context=8)
VOCABULARY = 13


def tokens(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCABULARY, (3, SHAPE.context), generator=generator)


def weights(stage):
    return {p.name: (p, one.detach()) for p, one in placed_parameters(stage)}


@pytest.mark.ranks(1)
@pytest.mark.parametrize("tied", (True, False), ids=("tied", "untied"))
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32))
def test_at_size_one_it_is_the_reference(world, tied, dtype):
    mesh = Mesh.single(world)
    shape = config.Model(**{**vars(SHAPE), "tied": tied})
    model = GPTStage(shape, VOCABULARY, mesh, dtype)
    for one in model.parameters():
        one.data += 0.02 * torch.randn(one.shape, generator=torch.Generator().manual_seed(2))
    reference = ReferenceGPT(3, 4, 16, SHAPE.context, VOCABULARY, tied).to(dtype)
    merged = merge(weights(model), mesh)
    reference.load(merged)
    assert len(merged) == len(list(reference.parameters()))

    inputs, targets = tokens(1), tokens(2)
    loss = model.token_losses(model(inputs), targets).mean()
    expected = reference.loss(inputs, targets)
    limit = 1e-12 if dtype is torch.float64 else 1e-5
    assert abs(float(loss - expected)) <= limit * abs(float(expected))
    assert torch.allclose(model.logits(model(inputs)), reference(inputs), rtol=limit, atol=limit)
    loss.backward()
    expected.backward()
    ours = {p.name: one.grad for p, one in placed_parameters(model)}
    largest = max(float(one.grad.abs().max()) for one in reference.parameters())
    for name, one in reference.named_parameters():
        error = float((ours[name].reshape(one.shape) - one.grad).abs().max())
        assert error <= limit * max(float(one.grad.abs().max()), 1e-3 * largest), name


@pytest.mark.parametrize("tied", (True, False), ids=("tied", "untied"))
def test_initial_weights_have_one_hash_on_every_layout(world, tied):
    shape = config.Model(**{**vars(SHAPE), "tied": tied})
    alone = digest(
        merge(
            weights(GPTStage(shape, VOCABULARY, Mesh.single(world), torch.float32)),
            Mesh.single(world),
        )
    )
    for axes in ({"tensor": world.size}, {"pipeline": min(world.size, 3)}, {}):
        if world.size % axes.get("pipeline", 1):
            continue
        mesh = mpmp.mesh(**axes)
        stage = GPTStage(shape, VOCABULARY, mesh, torch.float32)
        merged = merge(weights(stage), mesh)
        if world.rank == 0:
            assert digest(merged) == alone, mesh.layout
        mesh.free()


def test_the_norm_counts_every_element_once(world):
    for axes in ({"tensor": world.size}, {"pipeline": min(world.size, 3)}, {}):
        if world.size % axes.get("pipeline", 1):
            continue
        mesh = mpmp.mesh(**axes)
        stage = GPTStage(SHAPE, VOCABULARY, mesh, torch.float64)
        count = 0
        for one in stage.parameters():
            one.grad = torch.ones_like(one)
        alone = GPTStage(SHAPE, VOCABULARY, Mesh.single(world), torch.float64)
        count = sum(one.numel() for one in alone.parameters())
        norm = global_norm(stage.parameters(), mesh.model)
        assert abs(float(norm) - count**0.5) < 1e-9, mesh.layout
        clip_(list(stage.parameters()), norm, 2 * float(norm))
        assert all(bool((one.grad == 1).all()) for one in stage.parameters())
        clip_(list(stage.parameters()), norm, float(norm) / 4)
        assert all(bool((one.grad == 0.25).all()) for one in stage.parameters())
        mesh.free()


@pytest.mark.ranks(3)
def test_empty_ranks_are_refused(world):
    few = config.Model(layers=2, heads=2, width=16, context=8)
    for axes in ({"tensor": 3}, {"pipeline": 3}):
        mesh = mpmp.mesh(**axes)
        with pytest.raises(LayoutError, match="use at most 2"):
            GPTStage(few, VOCABULARY, mesh, torch.float32)
        mesh.free()


@pytest.mark.ranks(2, 3)
def test_dropout_masks_do_not_depend_on_the_cut(world):
    shape = config.Model(**{**vars(SHAPE), "dropout": 0.3})
    mesh, samples = mpmp.mesh(tensor=world.size), torch.tensor([5, 6, 7])
    stage = GPTStage(shape, VOCABULARY, mesh, torch.float64)
    alone = GPTStage(shape, VOCABULARY, Mesh.single(world), torch.float64)
    cut, whole = stage(tokens(), samples), alone(tokens(), samples)
    assert torch.allclose(cut, whole, rtol=1e-12, atol=1e-14)
    assert not torch.allclose(whole, alone(tokens()), rtol=1e-3)
    assert not torch.allclose(whole, alone(tokens(), samples + 1), rtol=1e-3)
    mesh.free()
