"""A character model trained in every kind of layout: the losses are those of one process."""

from __future__ import annotations

import os
from pathlib import Path
from shlex import split

import pytest

from harness import ROOT, run_ranks
from system.small import HOME, events, plant_text

LAYOUTS = ["tp2.sp", "dp2.zero3"]
MORE = ["pp2", "cp2", "dp2.ep2"]
TINY = split(
    "--data.path text.txt --model.layers 2 --model.heads 2 --model.width 32 --model.context 16 "
    "--train.batch 8 --train.eval_batches 1 --train.sample_tokens 0"
)
RECIPE = ["--recipe", str(ROOT / "recipes" / "nanogpt-char.toml")]
LIMIT = 1e-3


def losses(n: int, args: list[str], folder: Path, timeout: float) -> list[float]:
    run = run_ranks(
        n,
        ["-m", "mpmp.train", *args, "--checkpoint.dir", "run"],
        cwd=folder,
        env={**HOME, "OMP_NUM_THREADS": "1"},
        timeout=timeout,
    )
    assert run.rc == 0 and run.stderr == "", run.text
    return [one["loss"] for one in events(folder / "run", "step")]


def compare(layouts: list[str], args: list[str], folder: Path, timeout: float) -> None:
    found = {}
    for layout in ["dp1", *layouts]:
        place = folder / layout
        place.mkdir()
        plant_text(place)
        experts = ["--model.experts", "4"] if "ep" in layout else []
        steps = [*args, *experts, "--layout", layout]
        found[layout] = losses(1 if layout == "dp1" else 2, steps, place, timeout)
        if experts:
            alone = folder / f"{layout} alone"
            alone.mkdir()
            plant_text(alone)
            expected = losses(1, [*args, *experts], alone, timeout)
        else:
            expected = found["dp1"]
        assert len(expected) == 100 and expected[-1] < expected[0]
        differences = [abs(a - b) for a, b in zip(found[layout], expected, strict=True)]
        assert max(differences) <= LIMIT, f"{layout}: {max(differences)}"


@pytest.mark.timeout(300)
@pytest.mark.parametrize("layouts", [LAYOUTS, pytest.param(MORE, marks=pytest.mark.slow)])
def test_a_hundred_steps_in_every_layout(layouts: list[str], tmp_path: Path) -> None:
    compare(layouts, [*TINY, "--train.steps", "100"], tmp_path, 60)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_hundred_steps_of_shakespeare(tmp_path: Path) -> None:
    """MPMP_TEXT names the text of nanoGPT's recipe, tinyshakespeare."""
    text = os.environ.get("MPMP_TEXT")
    if text is None:
        pytest.skip("optional data: MPMP_TEXT names no text")
    args = [*RECIPE, "--data.path", text, "--train.steps", "100", "--train.sample_tokens", "0"]
    args += ["--train.eval_every", "0", "--train.eval_batches", "1"]
    compare(["dp2", "tp2", "pp2", "cp2", "dp2.zero3"], args, tmp_path, 200)
