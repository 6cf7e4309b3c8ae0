"""What autograd keeps of our modules is what ``programs/layers.py`` says, to the byte."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import mpmp
from mpmp import config, models
from mpmp.comm.mesh import Mesh
from mpmp.optim.adamw import make_optimizer
from mpmp.parallel import zero
from mpmp.parallel.memory import kept_bytes, measure, show, table
from mpmp.parallel.stage import Microbatch, Part
from mpmp.programs import layers, operations
from mpmp.programs import layers_published as published
from mpmp.programs.operations import Shape, Share, Sizes, Work, num_parameters
from mpmp.programs.sequence import cut_sequence, positions

ROWS, VOCABULARY = 2, 97
GPT = config.Model(layers=2, heads=4, width=64, context=64)
LLAMA = replace(GPT, kind="llama", kv_heads=2, hidden=96)
UNEVEN = replace(GPT, heads=6, width=96, context=63, hidden=101)
MODELS = {
    "gpt": GPT,
    "gpt-dropped": replace(GPT, dropout=0.1),
    "gpt-untied": replace(GPT, tied=False),
    "gpt-one-kv": replace(GPT, kv_heads=1),
    "gpt-uneven": UNEVEN,
    "llama": LLAMA,
    "llama-stacked": replace(LLAMA, kv_heads=None),
    "llama-dropped": replace(LLAMA, dropout=0.1),
    "bert": replace(GPT, kind="bert"),
    "mlp": replace(GPT, kind="mlp"),
}
MIXTURES = {
    "gpt": replace(GPT, experts=4),
    "llama-one": replace(LLAMA, experts=4, top_k=1),
}


@dataclass(frozen=True)
class How:
    """What a model is built with, beyond its shape."""

    dtype: torch.dtype = torch.float32
    narrow: bool = False
    """Products in 16 bits, by autocast."""
    sequence: bool = False
    recompute: str = "none"
    attention: str = "ring"
    rows: int = ROWS


def microbatch(model, mesh, how):
    """Random tokens at this rank's positions."""
    cut = cut_sequence(model.context, mesh.context.size, how.attention, model.kind != "bert")
    places = torch.tensor(positions(cut[mesh.context.rank]))
    generator = torch.Generator().manual_seed(0)
    shape = (2, how.rows, model.context)
    inputs, targets = torch.randint(VOCABULARY, shape, generator=generator)[..., places].unbind()
    samples = torch.arange(how.rows) if model.dropout else None
    return Microbatch(inputs.clone(), targets.clone(), samples, places, model.context)


def build(model, mesh, how):
    part = Part(0, 1, (0, model.layers))
    options = {name: getattr(how, name) for name in ("sequence", "recompute", "attention")}
    return models.build(model, VOCABULARY, mesh, how.dtype, part, **options)


def forward(stage, given, how):
    """The objective of a microbatch."""
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how.narrow):
        hidden, extra = stage(given.inputs_Bt, given)
        loss = stage.losses(hidden, given).sum()
    return loss if extra is None else loss + extra


def outside(stage, given):
    """What the caller holds anyway."""
    return [*stage.parameters(), given.inputs_Bt, given.targets_Bt, given.positions_t]


def counted(model, mesh, how):
    """The stage, and bytes that autograd keeps of a forward."""
    stage, given = build(model, mesh, how), microbatch(model, mesh, how)
    loss, kept = measure(lambda: forward(stage, given, how), outside(stage, given))
    loss.backward()  # what was kept serves
    return stage, kept_bytes(kept)


def described(model, mesh, how):
    """The same by the formula."""
    names = ("kind", "layers", "heads", "width", "context", "tied", "experts", "top_k")
    shape = Shape(
        **{name: getattr(model, name) for name in names},
        kv_heads=model.num_kv_heads,
        hidden=model.num_hidden,
        vocabulary=VOCABULARY,
        dropped=model.dropout > 0,
    )
    share = Share(
        tensor=mesh.tensor.size,
        context=mesh.context.size,
        sequence=how.sequence,
        way=how.attention,
        recompute=how.recompute,
        tensor_rank=mesh.tensor.rank,
        context_rank=mesh.context.rank,
    )
    size = how.dtype.itemsize
    return Work(shape, share, Sizes(size, 2 if how.narrow else size), how.rows)


def expected(model, mesh, how):
    """Operations of the whole model on this rank."""
    return layers.stage(described(model, mesh, how))


def agree(model, mesh, how):
    """To the byte, and parameters to the element."""
    (stage, found), said = counted(model, mesh, how), expected(model, mesh, how)
    assert found == operations.kept_bytes(said), (mesh.layout, how, found)
    held = sum(one.numel() for one in stage.parameters())
    assert held == num_parameters(said)


# --- our formula ----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", MODELS)
def test_a_tensor_group_keeps_what_the_formula_says(world, case):
    """Whole and in pieces of the sequence, and on one rank."""
    mesh = mpmp.mesh(tensor=world.size)
    for sequence in (False, True)[: 1 + (world.size > 1)]:
        for recompute in ("none", "selective", "full"):
            agree(MODELS[case], mesh, How(sequence=sequence, recompute=recompute))
    mesh.free()


@pytest.mark.ranks(1, 2)
@pytest.mark.parametrize("case", ("gpt", "gpt-dropped", "llama", "bert"))
def test_arithmetic_of_8_and_of_2_bytes(world, case):
    mesh = mpmp.mesh(tensor=world.size)
    agree(MODELS[case], mesh, How(dtype=torch.float64))
    agree(MODELS[case], mesh, How(narrow=True))
    mesh.free()


@pytest.mark.ranks(1)
@pytest.mark.parametrize("case", ("gpt-dropped", "gpt-one-kv", "llama-dropped", "llama-stacked"))
def test_a_microbatch_of_one_sequence(world, case):
    """Products take what one sequence has where it lies."""
    agree(MODELS[case], Mesh.single(world), How(rows=1))
    agree(replace(MODELS[case], dropout=0.1), Mesh.single(world), How(rows=1))


@pytest.mark.ranks(2, 4)
@pytest.mark.parametrize("attention", ("ring", "ulysses"))
@pytest.mark.parametrize("case", ("gpt", "gpt-dropped", "gpt-uneven", "llama", "bert"))
def test_a_context_group_keeps_what_the_formula_says(world, case, attention):
    mesh = mpmp.mesh(context=world.size)
    for recompute in ("none", "selective"):
        agree(MODELS[case], mesh, How(attention=attention, recompute=recompute))
    agree(MODELS[case], mesh, How(attention=attention, narrow=True))
    mesh.free()


@pytest.mark.ranks(1, 2)
@pytest.mark.parametrize("case", MIXTURES)
def test_experts_keep_what_the_formula_says(world, case):
    """All tokens are computed here, so that it does not matter which expert they chose."""
    mesh = mpmp.mesh(tensor=world.size)
    for sequence in (False, True)[: world.size]:
        agree(MIXTURES[case], mesh, How(sequence=sequence))
    mesh.free()


# --- published formulas ---------------------------------------------------------------------------


@pytest.mark.ranks(1, 2, 4)
@pytest.mark.parametrize("recompute", ("none", "selective", "full"))
def test_a_block_that_stores_as_theirs_keeps_as_theirs(world, recompute):
    """Korthikanti et al. 2022, within 2 %: scores and masks are stored where weights drop.

    The difference of two models of which one has a layer more; elements have 4 bytes, not 2.
    """
    mesh = mpmp.mesh(tensor=world.size)
    long = replace(GPT, layers=1, heads=8, dropout=0.1, width=128)
    for sequence in (False, True)[: 1 + (world.size > 1)]:
        how = How(sequence=sequence, recompute=recompute)
        (_, one), (_, two) = (counted(replace(long, layers=number), mesh, how) for number in (1, 2))
        layer = published.Layer(long.context, ROWS, long.width, long.heads, itemsize=4)
        theirs = published.tensors(layer, world.size, sequence=sequence, recompute=recompute)
        total = sum(theirs.values())
        if sequence and recompute == "full":  # theirs is kept whole on every rank
            total /= world.size
        assert abs((two - one) / total - 1) <= 0.02, (mesh.layout, how)
    mesh.free()


@pytest.mark.ranks(4)
def test_what_ring_attention_keeps_falls_as_one_over_the_ranks(world):
    """A block's, at 1, 2 and 4 ranks that share a sequence of 256 tokens."""
    long, kept = replace(GPT, context=256), {}
    for size in (1, 2, 4):
        mesh = mpmp.mesh(context=size)
        kept[size] = [counted(replace(long, layers=number), mesh, How())[1] for number in (1, 2)]
        mesh.free()
    one, two, four = (after - before for before, after in kept.values())
    # One rank's kernel gives its result token by token; a ring's is copied to be so.
    copy = ROWS * long.context * long.width * 4
    assert two / (one + copy) == pytest.approx(1 / 2, rel=1e-6)
    assert four / (one + copy) == pytest.approx(1 / 4, rel=1e-6)
    assert four / one <= 1.07 / 4


# --- measuring ------------------------------------------------------------------------------------


class Born(TorchDispatchMode):
    """Every memory that an operation makes, as long as anybody has it."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = function(*args, **(kwargs or {}))
        taken = {one.untyped_storage().data_ptr() for one in tensors_of((args, kwargs))}
        for storage in (one.untyped_storage() for one in tensors_of(given)):
            if storage.data_ptr() not in taken:
                at, size = storage.data_ptr(), storage.nbytes()
                self.found.append((StorageWeakRef(storage), at, size))
        return given

    def alive(self):
        return {at: size for ref, at, size in self.found if not ref.expired()}


def tensors_of(tree):
    return [one for one in tree_leaves(tree) if isinstance(one, torch.Tensor)]


@pytest.mark.ranks(1)
@pytest.mark.parametrize("recompute", ("none", "selective", "full"))
@pytest.mark.parametrize("narrow", (False, True), ids=("float32", "bfloat16"))
def test_nothing_else_lives_until_backward(world, recompute, narrow):
    """What any operation of a forward gave and is still there is what autograd keeps."""
    mesh, how = Mesh.single(world), How(recompute=recompute, narrow=narrow)
    stage, given = build(GPT, mesh, how), microbatch(GPT, mesh, how)
    forward(stage, given, how)  # plans of collectives keep their own buffers from now on
    with Born() as born:
        loss, kept = measure(lambda: forward(stage, given, how), outside(stage, given))
    not_counted = [loss, *outside(stage, given)]
    there = born.alive()
    for one in not_counted:
        there.pop(one.untyped_storage().data_ptr(), None)
    assert sum(there.values()) == kept_bytes(kept)


@pytest.mark.ranks(1)
def test_what_is_counted():
    """Each memory once, whole; not what was there before, nor what a lost part of a graph kept."""
    x, weight = torch.ones(8, requires_grad=True), torch.ones(8, requires_grad=True)

    def work():
        lost = (x * 2).square()  # keeps its input
        del lost
        doubled = x * 2
        return (doubled[:4].exp() + doubled[4:].square() * weight[:4]).sum()

    result, kept = measure(work, [weight])
    # exp's result, the whole of what was squared, and the square.
    assert sorted(one.nbytes for one in kept) == [16, 16, 32]
    result.backward()
    assert measure(lambda: x.detach() * 2)[1] == []


@pytest.mark.ranks(2)
def test_the_table_of_a_rank(world):
    """All parts behind a step, beside their formulas."""
    mesh, how, settings = mpmp.mesh(), How(), config.Optimizer()
    stage, given = build(GPT, mesh, how), microbatch(GPT, mesh, how)
    sharded = zero.make([stage], mesh, 2, 1e6)
    optimizer = make_optimizer(sharded.pieces(), settings)
    sharded.begin()
    loss, kept = measure(lambda: forward(stage, given, how), outside(stage, given))
    with sharded.writing(0, last=True):
        loss.backward()
    sharded.finish()
    optimizer.step()
    sharded.step_done()
    rows = table(sharded, optimizer, 2, kept, operations.kept_bytes(expected(GPT, mesh, how)))
    text = show(rows)
    mesh.free()
    assert [row.what for row in rows] == ["weights", "gradients", "optimizer states", "activations"]
    assert all(abs(row.error) <= 0.01 for row in rows), text
    assert rows[-1].error == 0 and len(text.splitlines()) == 5
