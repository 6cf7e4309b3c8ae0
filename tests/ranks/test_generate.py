"""Generation says the same on every layout, and the same as the model without a cache."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

import mpmp
from mpmp import config, models
from mpmp.comm.mesh import Mesh
from mpmp.data.tokens import ByteTokenizer
from mpmp.errors import ConfigError
from mpmp.job.generation import Generation, pipeline_of, stage_of
from mpmp.job.generation_run import encoded, refuse
from mpmp.job.generation_text import Continuation, Ends
from mpmp.models.choice import Choice
from mpmp.parallel.cache import Cache
from mpmp.parallel.parts import parts
from mpmp.parallel.pipeline import Pipeline
from mpmp.parallel.placement import placed_parameters
from mpmp.parallel.stage import Microbatch
from mpmp.parallel.tensor import lay_by_columns
from mpmp.programs.schedules import SCHEDULES

VOCABULARY, CONTEXT = 13, 12
SHAPE = config.Model(layers=4, heads=4, width=16, context=CONTEXT)
CASES = {
    "gpt": SHAPE,
    "gpt-grouped": replace(SHAPE, kv_heads=2, tied=False),
    "llama": replace(SHAPE, kind="llama", hidden=21),
    "llama-grouped": replace(SHAPE, kind="llama", kv_heads=2),
    "llama-one-kv": replace(SHAPE, kind="llama", kv_heads=1),
    "mlp": replace(SHAPE, kind="mlp"),
    "gpt-experts": replace(SHAPE, experts=3),
}
QUICK = ("gpt", "llama-grouped", "gpt-experts")
ALL = [pytest.param(one, marks=[] if one in QUICK else pytest.mark.slow) for one in CASES]
SCHEDULED = [
    pytest.param(one, marks=[] if one == "zb_v" else pytest.mark.slow) for one in SCHEDULES
]
PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8, 9], [10], [3, 2, 1], [0, 12]]
GREEDY = Choice()
DRAW = Choice(temperature=0.7, top_k=9, top_p=0.9, seed=5)


def shaken(stage):
    """Weights large enough that tokens differ, biases that are not zero; alike on every layout."""
    for placement, one in placed_parameters(stage):
        box = torch.zeros(placement.shape, dtype=one.dtype)
        box = (box.flatten() + torch.arange(box.numel())).view(placement.shape)
        part = box[tuple(slice(*ends) for ends in placement.ranges)]
        one.data = 8 * one.data + 0.1 * (part + len(placement.name)).sin()
    return stage


def run(pipeline, mesh, choice=GREEDY, prompts=PROMPTS, tokens=20):
    ends = Ends(tokens, CONTEXT)
    rows = [Continuation(n, one, ByteTokenizer(), ends) for n, one in enumerate(prompts)]
    Generation(pipeline, mesh).run(rows, choice)
    return [row.tokens for row in rows]


def whole(world, shape):
    """The model on this rank alone."""
    mesh = Mesh.single(world)
    return mesh, shaken(stage_of(shape, VOCABULARY, mesh, torch.float64))


@torch.no_grad()
def recomputed(stage, choice, prompts=PROMPTS, tokens=20):
    """The same tokens, by the whole model over all tokens so far for each of them."""
    found = []
    for number, prompt in enumerate(prompts):
        ids = list(prompt)
        while len(ids) < CONTEXT and len(ids) - len(prompt) < tokens:
            inputs = torch.tensor([ids])
            batch = Microbatch(inputs, inputs, None, torch.arange(len(ids)), len(ids))
            hidden, _ = stage(inputs, batch)
            logits = stage.logits(hidden, batch)[:, -1]
            ids.append(int(choice.next(logits, [number], [len(ids)])))
        found.append(ids[len(prompt) :])
    return found


def layouts(size):
    found = [{"tensor": size}, {"pipeline": size}]
    return found + ([{"pipeline": 2, "tensor": 2}] if size == 4 else [])


@pytest.mark.parametrize("case", ALL)
def test_every_layout_says_what_the_whole_model_says(world, case):
    shape = CASES[case]
    _, alone = whole(world, shape)
    expected = {choice: recomputed(alone, choice) for choice in (GREEDY, DRAW)}
    assert expected[GREEDY] != expected[DRAW]
    found = []
    for axes in layouts(world.size):
        mesh = mpmp.mesh(**axes)
        stage = shaken(stage_of(shape, VOCABULARY, mesh, torch.float64))
        pipeline = pipeline_of(stage, mesh)
        found += [(choice, run(pipeline, mesh, choice)) for choice in expected]
        lay_by_columns(stage)
        stage.settle()
        found += [(choice, run(pipeline, mesh, choice)) for choice in expected]
        mesh.free()
    assert all(tokens == expected[choice] for choice, tokens in found)


@pytest.mark.ranks(1, 3)
@pytest.mark.parametrize("lean", (False, True))
@pytest.mark.parametrize("case", ALL)
def test_further_tokens_have_the_logits_of_the_whole_sequence(world, case, lean):
    """One at a time and several at once, in rows of equal and of unequal lengths."""
    mesh = mpmp.mesh(tensor=world.size)
    stage = shaken(stage_of(CASES[case], VOCABULARY, mesh, torch.float64))
    inputs = torch.randint(VOCABULARY, (3, CONTEXT), generator=torch.Generator().manual_seed(1))
    gaps = []
    with torch.no_grad():
        batch = Microbatch(inputs, inputs, None, torch.arange(CONTEXT), CONTEXT)
        expected = stage.logits(stage(inputs, batch)[0], batch)
        if lean:
            stage.settle()
        for counts in (
            [[4] * 3, [1] * 3, [3] * 3, [1] * 3],
            [[2, 5, 1], [1] * 3, [2] * 3, [1] * 3],
        ):
            cache, at = Cache(3, CONTEXT, inputs.device), [0, 0, 0]
            for further in counts:
                t = max(further)
                cache.begin(further)
                fresh = torch.stack(
                    [inputs[row, start : start + t] for row, start in enumerate(at)]
                )
                step = Microbatch(fresh, fresh, None, cache.positions, t, cache=cache)
                logits = stage.logits(stage(fresh, step)[0], step)
                for row, (start, count) in enumerate(zip(at, further, strict=False)):
                    gap = logits[row, :count] - expected[row, start : start + count]
                    gaps.append(float(gap.abs().max()))
                at = [start + count for start, count in zip(at, further, strict=False)]
    mesh.free()
    assert max(gaps) < 1e-12, max(gaps)


@pytest.mark.ranks(2, 4)
@pytest.mark.parametrize("name", SCHEDULED)
def test_a_training_speaks_by_its_own_stages(world, name):
    """As the sample at the end of training does, whatever the schedule."""
    schedule, shape = SCHEDULES[name], replace(SHAPE, layers=8)
    mesh = mpmp.mesh(pipeline=world.size)
    stages = []
    for part in parts(schedule, world.rank, world.size, shape.layers):
        first = next((one.embedding for one in stages if one.embedding is not None), None)
        tied = first if part.last else None
        stages.append(models.build(shape, VOCABULARY, mesh, torch.float64, part, embedding=tied))
    tied = {id(one): one for stage in stages for _, one in placed_parameters(stage)}
    before = {key: one.data for key, one in tied.items()}
    for stage in stages:
        for _, one in placed_parameters(stage):
            one.data = before[id(one)]
        shaken(stage)
    said = run(Pipeline(mesh, stages, schedule, nullcontext), mesh)
    mesh.free()
    assert said == recomputed(whole(world, shape)[1], GREEDY)


@pytest.mark.ranks(2, 3)
@pytest.mark.parametrize("case", ("gpt", "gpt-experts"))
def test_sequence_and_context_parallel_ranks_speak_too(world, case):
    shape, found = CASES[case], []
    for axes, sequence in (({"tensor": world.size}, True), ({"context": world.size}, False)):
        mesh = mpmp.mesh(**axes)
        (part,) = parts(SCHEDULES["gpipe"], 0, 1, shape.layers)
        stage = models.build(shape, VOCABULARY, mesh, torch.float64, part, sequence=sequence)
        found.append(run(pipeline_of(shaken(stage), mesh), mesh))
        mesh.free()
    expected = recomputed(whole(world, shape)[1], GREEDY)
    assert found == [expected] * 2


@pytest.mark.ranks(1)
def test_what_a_prompt_draws_hangs_on_no_other_prompt(world):
    mesh, stage = whole(world, SHAPE)
    pipeline = pipeline_of(stage, mesh)
    together = run(pipeline, mesh, DRAW)
    ends = Ends(20, CONTEXT)
    for number, prompt in enumerate(PROMPTS):
        row = Continuation(number, prompt, ByteTokenizer(), ends)
        Generation(pipeline, mesh).run([row], DRAW)
        assert row.tokens == together[number]
    assert run(pipeline, mesh, replace(DRAW, seed=6)) != together


@pytest.mark.ranks(1)
def test_prompts_that_leave_no_room_and_models_that_do_not_speak_are_refused(world):
    class Mute(ByteTokenizer):
        end_of_text = None

    assert encoded(0, "", ByteTokenizer(), SHAPE) == [256]
    assert encoded(0, "ab", ByteTokenizer(), SHAPE, [1]) == [1, 97, 98]
    with pytest.raises(ConfigError, match="prompt 2 is empty"):
        encoded(1, "", Mute(), SHAPE)
    with pytest.raises(ConfigError, match="prompt 3 has 12 tokens, .* context of 12"):
        encoded(2, "x" * CONTEXT, ByteTokenizer(), SHAPE)
    for model, words in (
        (replace(SHAPE, kind="bert"), "both sides"),
        (replace(SHAPE, experts=2, capacity=1.0), "capacity 1.0"),
    ):
        with pytest.raises(ConfigError, match=words):
            refuse(config.Config(model=model))
    refuse(config.Config(model=CASES["gpt-experts"]))
