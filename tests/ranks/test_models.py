"""Every kind of model against its one-file reference, and what may not depend on the layout."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import mpmp
from mpmp import config, models
from mpmp.comm.mesh import Mesh
from mpmp.errors import ConfigError, LayoutError
from mpmp.models.bert_reference import ReferenceBERT
from mpmp.models.gpt_reference import ReferenceGPT
from mpmp.models.llama_reference import ReferenceLLaMA
from mpmp.models.mlp_reference import ReferenceMLP
from mpmp.models.moe_reference import ReferenceMoE
from mpmp.parallel.merge import digest, merge
from mpmp.parallel.placement import placed_parameters
from mpmp.parallel.stage import NOT_COUNTED, Microbatch, Part
from mpmp.programs.partition import partition
from mpmp.programs.sequence import cut_sequence, positions

TIME, VOCABULARY, LAYERS, WIDTH = 7, 13, 2, 16
SHAPE = config.Model(layers=LAYERS, heads=4, width=WIDTH, context=8)
CASES = {
    "gpt": SHAPE,
    "gpt-untied": replace(SHAPE, tied=False),
    "gpt-grouped": replace(SHAPE, kv_heads=2),
    "llama": replace(SHAPE, kind="llama", tied=False, hidden=21),
    "llama-grouped": replace(SHAPE, kind="llama", kv_heads=2),
    "llama-one-kv": replace(SHAPE, kind="llama", kv_heads=1),
    "bert": replace(SHAPE, kind="bert"),
    "mlp": replace(SHAPE, kind="mlp"),
    "gpt-experts": replace(SHAPE, experts=3, capacity=1.1, balance=0.3),
    "llama-experts": replace(SHAPE, kind="llama", experts=4),
}
WITHOUT_REFERENCE = ("gpt-grouped", "llama-experts")
LENGTHS = torch.tensor([7, 4, 6])


def tokens(seed=0, vocabulary=VOCABULARY):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocabulary, (3, TIME), generator=generator)


def batch(shape, vocabulary=VOCABULARY, samples=None):
    """One microbatch; BERT's has padding, and few of its words were masked."""
    targets, lengths = tokens(2, vocabulary), None
    if shape.kind == "bert":
        lengths = LENGTHS
        counted = (torch.arange(TIME) < lengths[:, None]) & (torch.arange(TIME) % 3 == 0)
        targets = targets.where(counted, NOT_COUNTED)
    return Microbatch(tokens(1), targets, samples, torch.arange(TIME), TIME, lengths)


def build(shape, mesh, dtype=torch.float64, **options):
    """This rank's part, with biases that are not zero: zeros hide much."""
    stages, number = mesh.pipeline.size, mesh.pipeline.rank
    shared = (0, stages - 1) if stages > 1 else ()
    part = Part(number, stages, partition(shape.layers, stages)[number], shared)
    stage = models.build(shape, VOCABULARY, mesh, dtype, part, **options)
    for placement, one in placed_parameters(stage):
        whole = torch.arange(one.placement.shape[-1], dtype=dtype)
        start, stop = placement.ranges[-1]
        one.data += 0.02 * (whole[start:stop] + len(placement.name)).sin()
    return stage


def weights(stage):
    return {p.name: (p, one.detach()) for p, one in placed_parameters(stage)}


def step(stage, microbatch):
    """The entropy of one whole model, and what is added to it (a part of it on each rank)."""
    hidden, extra = stage(microbatch.inputs_Bt, microbatch)
    loss = stage.losses(hidden, microbatch).sum() / (microbatch.targets_Bt >= 0).sum()
    added = loss.new_zeros(()) if extra is None else extra / microbatch.rows
    (loss + added).backward()
    return loss.detach(), added.detach()


def summed_gradients(stage, mesh):
    """Merged on rank 0, as the buckets would sum them."""
    shards = {}
    for placement, one in placed_parameters(stage):
        total = mesh.sum_group(placement).allreduce(one.grad.contiguous())
        shards[placement.name] = placement, total
    return merge(shards, mesh)


def alike(found, expected, limit):
    """Largest error of each tensor, by its largest element; small ones count less."""
    largest = max(float(one.abs().max()) for one in expected.values())
    assert found.keys() == expected.keys()
    for name, one in expected.items():
        error = float((found[name].reshape(one.shape) - one).abs().max())
        assert error <= limit * max(float(one.abs().max()), 1e-3 * largest), (name, error)


def reference(shape, dtype):
    """The plain model of a shape, and the arguments of its loss behind tokens and targets."""
    common = {"layers": LAYERS, "width": WIDTH, "vocabulary": VOCABULARY, "tied": shape.tied}
    if shape.kind == "llama":
        kv_heads, hidden = shape.num_kv_heads, shape.num_hidden
        made = ReferenceLLaMA(heads=4, kv_heads=kv_heads, hidden=hidden, **common)
    elif shape.kind == "mlp":
        made = ReferenceMLP(hidden=shape.num_hidden, **common)
    elif shape.experts:
        more = {name: getattr(shape, name) for name in ("experts", "top_k", "capacity", "balance")}
        made = ReferenceMoE(heads=4, context=shape.context, **common, **more)
    else:
        kind = ReferenceBERT if shape.kind == "bert" else ReferenceGPT
        made = kind(heads=4, context=shape.context, **common)
    return made.to(dtype), (LENGTHS,) if shape.kind == "bert" else ()


# --- one process ----------------------------------------------------------------------------------


@pytest.mark.ranks(1)
@pytest.mark.parametrize("case", [name for name in CASES if name not in WITHOUT_REFERENCE])
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32))
def test_at_size_one_it_is_the_reference(world, case, dtype):
    shape, mesh = CASES[case], Mesh.single(world)
    stage = build(shape, mesh, dtype)
    plain, more = reference(shape, dtype)
    merged = merge(weights(stage), mesh)
    plain.load(merged)
    assert len(merged) == len(list(plain.parameters()))

    microbatch = batch(shape)
    loss = sum(step(stage, microbatch))
    expected = plain.loss(microbatch.inputs_Bt, microbatch.targets_Bt, *more)
    expected.backward()
    limit = 1e-12 if dtype is torch.float64 else 1e-5
    assert abs(float(loss - expected)) <= limit * abs(float(expected))
    hidden, _ = stage(microbatch.inputs_Bt, microbatch)
    logits = plain(microbatch.inputs_Bt, *more)
    assert torch.allclose(stage.logits(hidden, microbatch), logits, rtol=limit, atol=limit)
    gradients = {name: one.grad for name, one in plain.named_parameters()}
    ours = {p.name: one.grad for p, one in placed_parameters(stage)}
    if shape.experts:
        gradients = {name if name in ours else f"{name}.weight": g for name, g in gradients.items()}
    alike(ours, gradients, limit)


# --- any layout -----------------------------------------------------------------------------------


@pytest.mark.parametrize("sequence", (False, True), ids=("whole", "pieces"))
@pytest.mark.parametrize("case", CASES)
def test_cut_over_the_tensor_axis_it_learns_the_same(world, case, sequence):
    shape, mesh, alone = CASES[case], mpmp.mesh(tensor=world.size), Mesh.single(world)
    shape = replace(shape, dropout=0.2)
    microbatch = batch(shape, samples=torch.tensor([5, 6, 7]))
    whole = build(shape, alone)
    expected, _ = step(whole, microbatch)
    cut = build(shape, mesh, sequence=sequence)
    loss, _ = step(cut, microbatch)
    gradients = summed_gradients(cut, mesh)
    mesh.free()
    assert abs(float(loss - expected)) <= 1e-12 * float(expected)
    if world.rank == 0:
        alike(gradients, summed_gradients(whole, alone), 1e-10)


def beginning(microbatch, time):
    """The first tokens of each sequence."""
    lengths = microbatch.lengths_B
    return replace(
        microbatch,
        inputs_Bt=microbatch.inputs_Bt[:, :time],
        targets_Bt=microbatch.targets_Bt[:, :time],
        positions_t=torch.arange(time),
        length=time,
        lengths_B=None if lengths is None else lengths.clamp(max=time),
    )


def learns_alike_on(mesh, shape, kind, sequence, time=TIME):
    """The loss and gradients of a model whose ranks share sequences are those of one process."""
    alone = Mesh.single(mesh.world)
    microbatch = beginning(batch(shape, samples=torch.tensor([5, 6, 7])), time)
    whole = build(shape, alone)
    expected, _ = step(whole, microbatch)
    causal = shape.kind != "bert"
    pieces = cut_sequence(time, mesh.context.size, kind, causal)[mesh.context.rank]
    at = torch.tensor(positions(pieces), dtype=torch.int64)
    own = replace(
        microbatch,
        inputs_Bt=microbatch.inputs_Bt[:, at],
        targets_Bt=microbatch.targets_Bt[:, at],
        positions_t=at,
    )
    stage = build(shape, mesh, attention=kind, sequence=sequence)
    counted = (microbatch.targets_Bt >= 0).sum()
    hidden, extra = stage(own.inputs_Bt, own)
    loss = stage.losses(hidden, own).sum() / counted
    (loss if extra is None else loss + extra / own.rows).backward()
    total = mesh.context.allreduce(loss.detach())
    gradients = summed_gradients(stage, mesh)
    assert abs(float(total - expected)) <= 1e-12 * float(expected)
    if mesh.world.rank == 0:
        alike(gradients, summed_gradients(whole, alone), 1e-10)


@pytest.mark.parametrize("kind", ("ring", "ulysses"))
@pytest.mark.parametrize("case", ("gpt", "llama-grouped", "bert"))
def test_cut_over_the_context_axis_it_learns_the_same(world, case, kind):
    mesh = mpmp.mesh(context=world.size)
    learns_alike_on(mesh, replace(CASES[case], dropout=0.2), kind, False)
    mesh.free()


@pytest.mark.ranks(3)
@pytest.mark.parametrize("kind", ("ring", "ulysses"))
@pytest.mark.parametrize("case", ("gpt", "llama-grouped", "bert"))
def test_a_rank_may_have_nothing_of_a_short_sequence(world, case, kind):
    mesh = mpmp.mesh(context=3)
    learns_alike_on(mesh, replace(CASES[case], dropout=0.2), kind, False, time=2)
    mesh.free()


@pytest.mark.ranks(4)
@pytest.mark.parametrize("sequence", (False, True), ids=("whole", "pieces"))
@pytest.mark.parametrize("case", CASES)
def test_cut_over_both_axes_it_learns_the_same(world, case, sequence):
    mesh = mpmp.mesh(context=2, tensor=2)
    learns_alike_on(mesh, replace(CASES[case], dropout=0.2), "ring", sequence)
    mesh.free()


@pytest.mark.parametrize("sequence", (False, True), ids=("whole", "pieces"))
@pytest.mark.parametrize("recompute", ("selective", "full"))
def test_what_is_computed_again_is_the_same(world, recompute, sequence):
    shape, mesh = replace(CASES["llama-grouped"], dropout=0.2), mpmp.mesh(tensor=world.size)
    microbatch = batch(shape, samples=torch.tensor([5, 6, 7]))
    found = []
    for how in ("none", recompute):
        stage = build(shape, mesh, sequence=sequence, recompute=how)
        found.append((float(step(stage, microbatch)[0]), summed_gradients(stage, mesh)))
    mesh.free()
    (loss, gradients), (again, gradients_again) = found
    assert loss == again
    if world.rank == 0:
        alike(gradients_again, gradients, 0.0)


@pytest.mark.parametrize("sequence", (False, True), ids=("whole", "pieces"))
@pytest.mark.parametrize("recompute", ("none", "full"))
@pytest.mark.parametrize("case", ("gpt", "llama-grouped"))
def test_weight_gradients_may_come_later(world, case, recompute, sequence):
    """A split backward gives the gradients of one in one piece."""
    shape, mesh = CASES[case], mpmp.mesh(tensor=world.size)
    found = []
    for split in (False, True):
        stage = build(shape, mesh, sequence=sequence, recompute=recompute)
        if split:
            stage.deferred.begin()
        step(stage, batch(shape))
        if split:
            kept = stage.deferred.end()
            assert len(kept) == 2 * (4 if case == "gpt" else 5) + 1
            assert stage.blocks[0].mlp.up.weight.grad is None
            for parameter, compute in kept:
                gradient = compute()
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        found.append(summed_gradients(stage, mesh))
    mesh.free()
    if world.rank == 0:
        alike(found[1], found[0], 1e-14)


@pytest.mark.parametrize("sequence", (False, True), ids=("whole", "pieces"))
def test_tags_of_tokens_are_learnt_alike(world, sequence):
    shape, mesh, alone = CASES["bert"], mpmp.mesh(tensor=world.size), Mesh.single(world)
    microbatch = batch(shape, vocabulary=5)
    whole, cut = build(shape, alone, tags=5), build(shape, mesh, tags=5, sequence=sequence)
    expected, loss = step(whole, microbatch)[0], step(cut, microbatch)[0]
    gradients = summed_gradients(cut, mesh)
    hidden, _ = cut(microbatch.inputs_Bt, microbatch)
    logits = cut.logits(hidden, microbatch)
    mesh.free()
    assert abs(float(loss - expected)) <= 1e-12 * float(expected)
    assert logits.shape == (3, TIME, 5)
    if world.rank == 0:
        alike(gradients, summed_gradients(whole, alone), 1e-10)


@pytest.mark.ranks(2)
def test_arithmetic_of_16_bits_is_near(world):
    """Norms, softmax and sums over ranks keep their range; nothing is left in 16 bits."""
    mesh, alone = mpmp.mesh(tensor=world.size), Mesh.single(world)
    for case, shape in CASES.items():
        expected = float(step(build(shape, alone, torch.float32), batch(shape))[0])
        for sequence in (False, True):
            stage = build(shape, mesh, torch.float32, sequence=sequence)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                hidden, _ = stage(batch(shape).inputs_Bt, batch(shape))
                assert hidden.dtype is torch.float32, case
                losses = stage.losses(hidden, batch(shape))
            loss = losses.sum() / (batch(shape).targets_Bt >= 0).sum()
            loss.backward()
            assert losses.dtype is torch.float32
            assert abs(float(loss.detach()) / expected - 1) < 2e-2, case
            assert all(one.grad.dtype is torch.float32 for one in stage.parameters())
    mesh.free()


@pytest.mark.parametrize("case", CASES)
def test_initial_weights_have_one_hash_on_every_layout(world, case):
    shape, single = replace(CASES[case], layers=3), Mesh.single(world)
    alone = digest(merge(weights(build(shape, single, torch.float32)), single))
    for axes in ({"tensor": world.size}, {"pipeline": min(world.size, 3)}, {}):
        if world.size % axes.get("pipeline", 1):
            continue
        mesh = mpmp.mesh(**axes)
        merged = merge(weights(build(shape, mesh, torch.float32)), mesh)
        if world.rank == 0:
            assert digest(merged) == alone, mesh.layout
        mesh.free()


@pytest.mark.slow  # the compiler takes 20 s and more
@pytest.mark.ranks(1, 2, timeout=400)
@pytest.mark.parametrize("recompute", ("none", "full"))
def test_compiled_blocks_compute_the_same(world, recompute):
    shape, mesh = CASES["llama-grouped"], mpmp.mesh(tensor=world.size)
    plain = build(shape, mesh, torch.float32)
    compiled = build(shape, mesh, torch.float32, compile=True, recompute=recompute)
    (expected, _), (loss, _) = step(plain, batch(shape)), step(compiled, batch(shape))
    gradients = summed_gradients(plain, mesh), summed_gradients(compiled, mesh)
    mesh.free()
    assert abs(float(loss / expected) - 1) < 1e-5
    if world.rank == 0:
        alike(*gradients, 1e-4)


@pytest.mark.ranks(3)
def test_ranks_without_work_are_refused(world):
    mesh = mpmp.mesh(tensor=3)
    for few, what in (
        (replace(SHAPE, heads=2), r"heads \(2\)"),
        (replace(SHAPE, hidden=2), r"hidden units \(2\)"),
        (replace(SHAPE, kind="mlp", hidden=2), "hidden"),
    ):
        with pytest.raises(LayoutError, match=f"{what}.*use at most 2"):
            build(few, mesh)
    with pytest.raises(LayoutError, match="tags"):
        build(SHAPE, mesh, tags=2)
    mesh.free()


@pytest.mark.ranks(1)
def test_what_cannot_be_compiled_is_refused(world, monkeypatch):
    settings, mesh = config.Config(train=config.Train(compile=True)), Mesh.single(world)
    models.refuse(settings, mesh, VOCABULARY, splits=False)
    with pytest.raises(ConfigError, match="leaves weight gradients for later"):
        models.refuse(settings, mesh, VOCABULARY, splits=True)
    selective = replace(settings, train=replace(settings.train, recompute="selective"))
    with pytest.raises(ConfigError, match="take full or leave out"):
        models.refuse(selective, mesh, VOCABULARY, splits=False)
    experts = replace(settings, model=replace(SHAPE, experts=4))
    with pytest.raises(ConfigError, match="known at run time only"):
        models.refuse(experts, mesh, VOCABULARY, splits=False)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match=r"needs a C\+\+ compiler"):
        models.refuse(settings, mesh, VOCABULARY, splits=False)


@pytest.mark.ranks(2, 3)
def test_dropout_masks_do_not_depend_on_the_cut(world):
    shape = replace(SHAPE, dropout=0.3)
    mesh, samples = mpmp.mesh(tensor=world.size), torch.tensor([5, 6, 7])
    stage, alone = build(shape, mesh), build(shape, Mesh.single(world))

    def hidden(stage, samples):
        return stage(tokens(), batch(shape, samples=samples))[0]

    cut, whole = hidden(stage, samples), hidden(alone, samples)
    assert torch.allclose(cut, whole, rtol=1e-12, atol=1e-14)
    assert not torch.allclose(whole, hidden(alone, None), rtol=1e-3)
    assert not torch.allclose(whole, hidden(alone, samples + 1), rtol=1e-3)
    mesh.free()
