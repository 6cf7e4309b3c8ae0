"""Layers in numbers: what papers print, what adds up, and what a cut may not change."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mpmp.programs import layers
from mpmp.programs import layers_published as published
from mpmp.programs.operations import (
    Shape,
    Share,
    Sizes,
    Work,
    kept_bytes,
    num_parameters,
    total_flops,
)
from mpmp.programs.schedules import SCHEDULES

GPT = Shape("gpt", 4, 8, 8, width=256, hidden=1024, context=128, vocabulary=1000)
LLAMA = replace(GPT, kind="llama", kv_heads=2, hidden=704)
UNEVEN = replace(GPT, heads=4, kv_heads=4, hidden=1001)
MIXTURE = replace(GPT, experts=4)
SIXTEEN = Sizes(2, 2)


def work(shape=GPT, sizes=SIXTEEN, rows=3, **share):
    return Work(shape, Share(**share), sizes, rows)


# --- published ------------------------------------------------------------------------------------


@pytest.mark.parametrize("recompute", ("none", "selective", "full"))
@pytest.mark.parametrize("sequence", (False, True), ids=("whole", "pieces"))
@pytest.mark.parametrize("ranks", (1, 2, 8))
def test_the_list_of_tensors_adds_up_to_the_formula(ranks, sequence, recompute):
    layer = published.Layer(tokens=2048, sequences=4, width=12288, heads=96)
    found = published.tensors(layer, ranks, sequence=sequence, recompute=recompute)
    expected = published.formula(layer, ranks, sequence=sequence, recompute=recompute)
    assert sum(found.values()) == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize("recompute", ("none", "selective"))
@pytest.mark.parametrize("sequence", (False, True), ids=("whole", "pieces"))
@pytest.mark.parametrize("ranks", (1, 2, 4))
@pytest.mark.parametrize("itemsize", (2, 4, 8))
def test_a_block_that_stores_as_they_do_keeps_as_much(itemsize, ranks, sequence, recompute):
    """One type throughout, dropout; what we keep beyond are two numbers a token and norm."""
    shape, cut = replace(GPT, dropped=True), ranks if sequence else 1
    how = {"sequence": sequence, "recompute": recompute}
    block = layers.block(work(shape, Sizes(itemsize, itemsize), tensor=ranks, **how))
    layer = published.Layer(128, 3, 256, 8, itemsize)
    theirs = sum(published.tensors(layer, ranks, **how).values())
    statistics = 4 * 3 * 128 * itemsize / cut
    assert kept_bytes(block) == pytest.approx(theirs + statistics, rel=1e-12)
    assert kept_bytes(block) == pytest.approx(theirs, rel=4e-3)


def test_full_recomputation_keeps_the_input_of_a_layer():
    block = layers.block(work(replace(GPT, dropped=True), recompute="full"))
    assert kept_bytes(block) == published.formula(published.Layer(128, 3, 256, 8), recompute="full")


@pytest.mark.parametrize("recompute", ("none", "full"))
def test_flops_are_those_of_the_closed_form(recompute):
    found = total_flops(layers.stage(work(recompute=recompute)), hardware=True)
    assert found == pytest.approx(published.model_flops(3, 4, 128, 256, 1000, recompute), rel=1e-12)


def test_selective_recomputation_repeats_the_scores():
    """A forward of the scores more, which is less than the paper prints."""
    plain, more = (
        published.model_flops(3, 4, 128, 256, 1000, how) for how in ("none", "selective")
    )
    found = total_flops(layers.stage(work(recompute="selective")), hardware=True)
    scores = 72 * 3 * 4 * 128 * 256**2 * 128 / (6 * 256)
    assert found == pytest.approx(plain + scores / 3, rel=1e-12) and found < more


def test_states_are_those_that_zero_prints():
    """7.5 B parameters on 64 ranks, GB (Rajbhandari et al. 2019, figure 1)."""
    found = [published.state_bytes(7.5e9, 64, stage) / 1e9 for stage in range(4)]
    assert found == pytest.approx([120, 31.4, 16.6, 1.9], abs=0.05)
    for stage in range(4):  # 4 + 4 + 8 bytes: as many, shared out otherwise
        full = published.state_bytes(7.5e9, 1, stage, (4, 4, 8))
        assert full == published.state_bytes(7.5e9, 1, stage)


@pytest.mark.parametrize("stages", (2, 4))
@pytest.mark.parametrize("microbatches", (1, 2, 4, 8))
def test_microbatches_alive_are_those_of_the_schedule(stages, microbatches):
    for rank in range(stages):
        actions = SCHEDULES["1f1b"].actions(rank, stages, microbatches)
        assert published.alive(rank, stages, microbatches) == most_alive(actions)
    if microbatches >= stages:
        chunks = SCHEDULES["interleaved"].chunks
        for rank in range(stages):
            actions = SCHEDULES["interleaved"].actions(rank, stages, microbatches)
            found = most_alive(actions) / chunks
            assert published.alive(rank, stages, microbatches, chunks) == found
        factor = 1 + (stages - 1) / (stages * chunks)
        if microbatches > stages:
            assert published.alive(0, stages, microbatches, chunks) == stages * factor


def most_alive(actions):
    alive = most = 0
    for action in actions:
        alive += {"F": 1, "B": -1}.get(action.kind, 0)
        most = max(most, alive)
    return most


# --- what a cut may not change --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "ranks"),
    [(GPT, 2), (GPT, 3), (UNEVEN, 3), (UNEVEN, 4), (LLAMA, 2)],
    ids=("gpt-2", "gpt-3", "uneven-3", "uneven-4", "llama-2"),
)
def test_ranks_share_out_work_and_weights(shape, ranks):
    """All FLOPs are there once; weights that are cut, too, and so is what is kept of their work."""
    whole = layers.block(work(shape))
    parts = [layers.block(work(shape, tensor=ranks, tensor_rank=rank)) for rank in range(ranks)]
    assert sum(map(total_flops, parts)) == pytest.approx(total_flops(whole))
    cut = {"attention", "output", "down", "activation"}
    for name in cut:
        (one,) = (op.kept for op in whole if op.name == name)
        assert sum(op.kept for part in parts for op in part if op.name == name) == one, name
    pieces = [
        layers.block(work(shape, tensor=ranks, tensor_rank=rank, sequence=True))
        for rank in range(ranks)
    ]
    assert sum(map(kept_bytes, pieces)) == kept_bytes(whole)


@pytest.mark.parametrize("way", ("ring", "ulysses"))
@pytest.mark.parametrize("shape", (GPT, LLAMA, MIXTURE), ids=("gpt", "llama", "experts"))
def test_what_is_kept_falls_with_the_ranks_that_share_a_sequence(shape, way):
    """But for results that are kept twice to be sent on, and KV heads that several ranks read."""
    one, two, four = (
        kept_bytes(layers.block(work(shape, Sizes(), context=ranks, way=way)))
        for ranks in (1, 2, 4)
    )
    assert one / 2 <= two <= 1.2 * one / 2
    assert two / 2 == pytest.approx(four, rel=3e-2)


def test_16_bit_products_keep_what_they_cast():
    narrow, wide = (layers.block(work(sizes=Sizes(4, size))) for size in (2, 4))
    matrices = sum(op.parameters for op in wide if op.flops) - 3 * 256 - 256 - 1024 - 256
    tokens = 3 * 128
    halved = 2 * tokens * (5 * 256 + 256 + 2 * 1024 + 256 - 256 + 256 - 256)
    lse = 4 * tokens * 8
    assert kept_bytes(wide) - kept_bytes(narrow) == halved - 2 * matrices + lse


def test_stages_add_up_to_the_model():
    whole = layers.stage(work())
    first = layers.stage(work(), 1, last=False)
    last = layers.stage(work(), 3, first=False)
    assert kept_bytes(whole) == kept_bytes(first) + kept_bytes(last)
    tied = GPT.vocabulary * GPT.width  # a copy at each end
    assert num_parameters(first) + num_parameters(last) == num_parameters(whole) + tied
