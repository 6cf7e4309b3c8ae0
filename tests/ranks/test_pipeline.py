"""A rank carries out any schedule: loss and gradients equal those of the model in one piece."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

import mpmp
from mpmp.errors import ConfigError
from mpmp.parallel import pipeline as module
from mpmp.parallel import zero
from mpmp.parallel.pipeline import Pipeline
from mpmp.parallel.stage import NOT_COUNTED
from mpmp.programs.check_schedules import check_schedule
from mpmp.programs.schedules import SCHEDULES
from mpmp.programs.steps import Action, Schedule
from ranks.staged import TIME, WIDTH, Whole, Written, chunks_of, microbatches_of

HIDDEN_BYTES = TIME * WIDTH * 8


def backwards(rank, ranks, microbatches):
    """A schedule of a user's own: the last microbatch first, both ways."""
    for number in reversed(range(microbatches)):
        yield Action("F", number)
    for number in range(microbatches):
        yield Action("B", number)


ALL = SCHEDULES | {"backwards": Schedule("backwards", backwards)}
ROWS = {
    "even": lambda p: [2] * (2 * p),
    "uneven": lambda p: [3, 1, 2] * p + [1] * p,
    "odd": lambda p: [2] + [1] * (2 * p),
    "one": lambda p: [1],
}


def close(ours, theirs):
    return torch.allclose(ours, theirs, rtol=1e-12, atol=1e-14)


def differences(mesh, schedule, rows, steps=2, gradients=Written):
    """Names of what differs from one process after some steps; empty where nothing does."""
    chunks, size = chunks_of(mesh, schedule), mesh.pipeline.size
    pipeline, gradients = Pipeline(mesh, chunks, schedule, nullcontext), gradients(chunks)
    found = []
    tied = pipeline.first_rank == pipeline.last_rank and schedule.chunks * size > 1
    whole = Whole(mesh.world, schedule.chunks * size, tied)
    generator = torch.Generator().manual_seed(9)
    for _ in range(steps):
        pieces, batch = microbatches_of(rows, generator)
        num_tokens, num_sequences = int((batch.targets_Bt != NOT_COUNTED).sum()), sum(rows)
        loss = pipeline.train(pieces, num_tokens, num_sequences, gradients, scale=4.0)
        whole.stages.zero_grad()
        expected, objective = whole.objective(batch, num_tokens, num_sequences)
        objective.backward()
        reference = whole.gradients()
        for one in (one for chunk in chunks for one in chunk.parameters()):
            name = one.placement.name
            if one.grad is None or not close(one.grad / 4, reference[name]):
                found.append(name)
        score, hidden = pipeline.score(pieces), pipeline.hidden(batch)
        if pipeline.last is None:
            assert loss == score == 0 and hidden is None
            continue
        logits = pipeline.last.logits(hidden, batch).transpose(1, 2)
        again = torch.nn.functional.cross_entropy(logits, batch.targets_Bt)
        for name, ours in (("loss", loss), ("score", score / num_tokens), ("logits", again)):
            if not close(ours, expected.detach()):
                found.append(name)
    return found


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", ALL)
def test_any_schedule_gives_the_gradients_of_one_process(world, name, rows):
    schedule, cut = ALL[name], ROWS[rows](world.size)
    try:
        schedule.demand(world.size, len(cut))
    except ConfigError as error:
        pytest.skip(str(error))
    mesh = mpmp.mesh(pipeline=world.size)
    assert differences(mesh, schedule, cut) == []
    mesh.free()


@pytest.mark.ranks(1, 2)
@pytest.mark.parametrize("name", SCHEDULES)
def test_buckets_of_all_chunks_get_their_gradients(world, name):
    """Small buckets, so that there are several a chunk; tied ends share one."""
    mesh = mpmp.mesh(pipeline=world.size)

    def buckets(chunks):
        return zero.make(chunks, mesh, 0, 200)

    assert differences(mesh, SCHEDULES[name], [2, 1, 2, 1], gradients=buckets) == []
    mesh.free()


@pytest.mark.ranks(2)
@pytest.mark.parametrize(
    "fault", ("W dropped", "W of another", "extra", "gradient handed on twice")
)
def test_a_wrong_action_is_seen(world, monkeypatch, fault):
    """W that does nothing, or adds another microbatch's product; stages' own part forgotten."""
    step, weight, backward = module._Step, module._Step._weight, module._Step._backward

    def dropped(self, part, is_last):
        self._kept[part.microbatch, part.chunk].clear()
        weight(self, part, is_last)

    def another(self, part, is_last):
        kept = self._kept[part.microbatch, part.chunk]
        self._other = kept[:] = getattr(self, "_other", kept)
        weight(self, part, is_last)

    def without_extra(self, part, gradient, is_last):
        live = self._live[part.microbatch, part.chunk]
        live.gradients[-1].zero_()
        backward(self, part, gradient, is_last)

    def twice(self, part, gradient, is_last):
        backward(self, part, None if gradient is None else 2 * gradient, is_last)

    name, wrong = {
        "W dropped": ("_weight", dropped),
        "W of another": ("_weight", another),
        "extra": ("_backward", without_extra),
        "gradient handed on twice": ("_backward", twice),
    }[fault]
    monkeypatch.setattr(step, name, wrong)
    mesh = mpmp.mesh(pipeline=2)
    found = differences(mesh, SCHEDULES["zb_h1"], [2, 1, 2, 1], steps=1)
    everywhere = mesh.everyone.allreduce(torch.tensor([len(found)]))
    assert int(everywhere) > 0
    mesh.free()


@pytest.mark.ranks(1, 2, 4)
@pytest.mark.parametrize("name", SCHEDULES)
def test_live_microbatches_and_bytes_are_those_of_the_schedule(world, name, monkeypatch):
    """1F1B keeps p microbatches alive on the first rank, GPipe all of them."""
    schedule, size, m = SCHEDULES[name], world.size, 8
    mesh = mpmp.mesh(pipeline=size)
    live, sent = [], []
    carry_out, send = module._Step.carry_out, mesh.pipeline.send

    def counted(self, part, x, is_last):
        carry_out(self, part, x, is_last)
        live.append(len(self._live))

    def counted_send(tensor, to, tag):
        sent.append(tensor.numel() * tensor.itemsize)
        return send(tensor, to, tag)

    monkeypatch.setattr(module._Step, "carry_out", counted)
    monkeypatch.setattr(mesh.pipeline, "send", counted_send)
    chunks = chunks_of(mesh, schedule)
    pieces, _ = microbatches_of([1] * m, torch.Generator().manual_seed(1))
    Pipeline(mesh, chunks, schedule, nullcontext).train(pieces, 1, 1, Written(chunks))
    report, rank = check_schedule(schedule, size, m), mesh.pipeline.rank
    assert max(live) == report.peak_live[rank]
    assert sum(sent) == report.sent_bytes(HIDDEN_BYTES)[rank]
    published = {"1f1b": min(size - rank, m), "zb_h1": min(size - rank, m), "gpipe": m}
    if name in published:
        assert max(live) == published[name]
    # Every border between stages on two ranks is crossed by each microbatch, there and back.
    borders = 2 * (size - 1) if schedule.folded else schedule.chunks * size - 1
    if size > 1:
        total = int(mesh.pipeline.allreduce(torch.tensor([sum(sent)])))
        assert total == 2 * m * borders * HIDDEN_BYTES
    else:
        assert not sent
    mesh.free()
