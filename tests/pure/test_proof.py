"""The rows that verify proves: those of each number of ranks, and what a row learns from."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mpmp.comm.mesh import fit
from mpmp.config import Data, Parallel
from mpmp.job import proof
from mpmp.verify import DEFAULT, DEFAULTS


@pytest.mark.parametrize("world", range(1, 9))
def test_every_row_is_a_layout_of_the_world(world: int) -> None:
    for base in (DEFAULT, DEFAULTS["tagging"]):
        for row in [*proof.suite(world, base), *proof.factored(world, base)]:
            assert fit(world, **row.of(base).parallel.axes), row


@pytest.mark.parametrize("world", (2, 3, 4, 8))
def test_tagging_is_proved_on_every_axis(world: int) -> None:
    rows = list(proof.suite(world, DEFAULTS["tagging"]))
    assert rows == [row for row in proof.suite(world, DEFAULT) if row.task == "tagging"]
    assert len({str(row) for row in rows}) == len(rows)
    settings = [row.of(DEFAULT) for row in rows]
    assert {one.task for one in settings} == {"tagging"}
    of = [one.parallel for one in settings]
    assert {one.zero for one in of} == {0, 1, 2, 3}
    assert {one.attention for one in of if one.context > 1} == {"ring", "ulysses"}
    for chosen in ("pipeline", "context", "tensor"):
        assert any(getattr(one, chosen) > 1 for one in of), chosen
    assert any(one.sequence for one in of)
    unequal = [one for one in settings if one.train.batch % world]
    assert any(one.parallel.microbatches == 2 for one in unequal)


def test_another_task_has_data_of_its_own() -> None:
    base = replace(DEFAULT, data=Data(path="text.txt", seed=5, shortest=3))
    row = proof.Row("dp2", {"train.batch": 7}, "tagging")
    assert str(row) == "dp2 task=tagging batch=7"
    made = row.of(base)
    assert (made.task, made.model.kind, made.data) == ("tagging", "bert", Data(seed=5))
    assert made.parallel == Parallel(data=2) and made.train.batch == 7
    tagging = replace(DEFAULTS["tagging"], data=Data(path="folder"))
    assert row.of(tagging).data.path == "folder"


def test_no_more_ranks_cut_tags_than_there_are() -> None:
    base = DEFAULTS["tagging"]
    every = {row.layout for row in proof.factored(8, base)}
    assert every - {row.layout for row in proof.factored(8, base, tags=7)} == {"dp1.pp1.tp8"}
