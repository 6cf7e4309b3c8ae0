"""A dry run foretells what ranks really send and hold."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from mpmp.comm.group import Group
from mpmp.config import Config, Model, Parallel, Train, parse_layout
from mpmp.job import setup
from mpmp.job.dry_run import dry_run
from mpmp.job.training import Training
from mpmp.parallel.memory import Living

MODEL = Model(layers=4, heads=4, width=96, context=64, dropout=0.1)
CASES = {
    "dp2.pp2": ({}, {"schedule": "zb_h1"}),
    "dp2.tp2.sp.zero1": ({"kind": "llama", "kv_heads": 1, "dropout": 0.0}, {}),
    "dp2.cp2.zero3": ({}, {}),
    "cp2.tp2": ({"kind": "bert", "heads": 6, "width": 96}, {"attention": "ulysses"}),
    "dp3.zero2": ({}, {}),
    "dp2.ep2": ({"experts": 4}, {}),
    "pp2": ({}, {}),
    "tp2.sp": ({}, {}),
    "cp2": ({"kind": "bert"}, {"attention": "ulysses"}),
}


def config_of(layout: str) -> Config:
    model, parallel = CASES[layout]
    return Config(
        parallel=Parallel(**parse_layout(layout), bucket_mb=0.01, **parallel),
        model=replace(MODEL, **model),
        train=Train(batch=12, eval_batches=1),
    )


def count(monkeypatch) -> Counter[tuple[int, ...]]:
    """Counts the bytes that groups, by their ranks, are asked to send."""
    found: Counter[tuple[int, ...]] = Counter()

    def watch(name, nbytes):
        real = getattr(Group, name)

        def watched(self, *args, **kwargs):
            result = real(self, *args, **kwargs)
            found[self.ranks] += nbytes(self, result, *args)
            return result

        monkeypatch.setattr(Group, name, watched)

    def part(passes):
        return lambda group, result, x, *_: passes * x.nbytes * (group.size - 1) / group.size

    def uneven(group, result, x, lengths=None, *_):
        own = len(x) // group.size if lengths is None else lengths[group.rank]
        return x.nbytes / max(1, len(x)) * (len(x) - own)

    watch("allreduce", part(2))
    watch("reduce_scatter", part(1))
    watch("allgather", lambda group, result, *_: part(1)(group, None, result))
    watch("alltoall", uneven)
    watch("send", lambda group, result, x, *_: x.nbytes)
    prepare = Group.prepare

    def prepared(self, collective, memory, *args, **kwargs):
        handle = prepare(self, collective, memory, *args, **kwargs)
        nbytes = part(2 if collective == "allreduce" else 1)(self, None, memory)

        class Counted:
            def start(_):
                found[self.ranks] += nbytes
                return handle.start()

            def run(_):
                found[self.ranks] += nbytes
                handle.run()

        return Counted()

    monkeypatch.setattr(Group, "prepare", prepared)
    return found


def ranks_of(layout: str) -> int:
    axes = parse_layout(layout)
    return axes.get("data", 1) * axes["pipeline"] * axes["context"] * axes["tensor"]


@pytest.mark.ranks(2, 3, timeout=120)
def test_what_was_foretold_is_what_happens(world, monkeypatch, capsys):
    compare(world, monkeypatch, capsys)


@pytest.mark.slow
@pytest.mark.ranks(4, timeout=600)
def test_what_was_foretold_of_four_ranks_is_what_happens(world, monkeypatch, capsys):
    compare(world, monkeypatch, capsys)


def compare(world, monkeypatch, capsys):
    for layout in (one for one in CASES if ranks_of(one) == world.size):
        config = config_of(layout)
        kinds = dry_run(config, world.size)
        assert f"on {world.size} ranks" in capsys.readouterr().out
        told = next(kind.told for kind in kinds if world.rank in kind.ranks)
        mesh = setup.make_mesh(config, world)
        objective = setup.make_objective(config, setup.read_corpus(config, world))
        with monkeypatch.context() as patch, Living() as living:
            sent = count(patch)
            training = Training(config, mesh, objective)
            living.most_bytes = living.bytes
            training.backward(0, training.objective.counted(0))
            peak = living.most_bytes
            training.optimizer.step()
            training.sharded.step_done()
        mesh.free()
        close = pytest.approx(sum(told.sent.values()), rel=0.05 if "ep" in layout else 1e-9)
        assert sum(sent.values()) == close, layout
        # The groups' own staging memory is not foretold; what lives at once hangs on timing, too.
        assert told.states <= living.bytes <= 1.15 * told.states, layout
        assert peak == pytest.approx(told.peak, rel=0.3), layout
