"""generate and evaluate: one trained model on other layouts, from all that it lies in."""

from __future__ import annotations

import json
from pathlib import Path
from shlex import split

import pytest

from harness import Run, run_ranks
from system.small import HOME, SMALL, alone, ended, events, plant_text

PROMPTS = split("--prompt 'def ' --prompt 'import argparse' --prompt '    for one'")
"""Of unequal lengths; the second leaves room for one token of a context of 16."""


def many(*row):
    """A row that is one of many."""
    return pytest.param(*row, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run of two ranks, in runs/a."""
    found = tmp_path_factory.mktemp("generate")
    plant_text(found)
    layout = split("--layout tp2 --train.steps 6 --train.dtype float64 --checkpoint.dir a")
    run = run_ranks(2, ["-m", "mpmp.train", *SMALL, *layout], cwd=found, env=HOME, timeout=120)
    assert run.rc == 0, run.text
    return found


def generated(folder: Path, n: int, *args: str) -> Run:
    words = ["-m", "mpmp.generate", "--dtype", "float64", *args]
    run = run_ranks(n, words, cwd=folder, env=HOME, timeout=120)
    assert run.rc == 0 and run.left_behind == 0 and run.stderr == "", run.text
    return run


def continuations(folder: Path, n: int, *args: str) -> list[dict]:
    generated(folder, n, *PROMPTS, "--json", "said.json", *args)
    return json.loads((folder / "said.json").read_text())["continuations"]


@pytest.mark.mpich_too
def test_it_says_the_same_on_every_layout_and_from_every_file(folder):
    one = continuations(folder, 1, "--checkpoint", "a")
    assert [len(row["tokens"]) for row in one] == [12, 1, 5]
    assert "the context of 16 tokens is full" in one[0]["ended"]
    assert continuations(folder, 2, "--checkpoint", "a/step_00000006", "--layout", "pp2") == one
    assert continuations(folder, 2, "--checkpoint", "a/model.safetensors") == one


@pytest.mark.slow
@pytest.mark.parametrize("layout", ("tp2.pp2", "dp2.tp2", "pp4", "dp2.pp2"))
def test_four_ranks_say_it_too(folder, layout):
    one = continuations(folder, 1, "--checkpoint", "a")
    assert continuations(folder, 4, "--checkpoint", "a", "--layout", layout) == one


def test_what_is_shown_is_the_prompt_and_its_text(folder):
    settings = split("--checkpoint a --prompt def --tokens 4 --temperature 0 --json said.json")
    run = generated(folder, 1, *settings)
    (said,) = json.loads((folder / "said.json").read_text())["continuations"]
    lines = run.stdout.splitlines()
    assert "def" + said["text"] in run.stdout
    assert lines[-2:-1] == ["prompt 1: 4 tokens, 4 tokens"] and "/s)" in lines[-1]


@pytest.mark.mpich_too
def test_an_evaluation_finds_the_loss_of_the_training_in_another_layout(folder):
    (validated,) = events(folder / "a", "validation")
    flags = split("--checkpoint a --layout dp2.zero3 --json found.json")
    run = run_ranks(2, ["-m", "mpmp.evaluate", *flags], cwd=folder, env=HOME, timeout=120)
    assert run.rc == 0, run.text
    found = json.loads((folder / "found.json").read_text())
    for name in ("nats", "bits_per_byte"):
        assert found[name] == pytest.approx(validated[name], rel=1e-12)
        assert f"{found[name]:.4f}" in run.stdout


@pytest.mark.slow
def test_an_evaluation_of_a_merged_model_resumes_nothing(folder):
    (validated,) = events(folder / "a", "validation")
    flags = split("--train.dtype float64 --train.eval-batches 1 --data.path text.txt")
    flags += split("--train.batch 8 --checkpoint.dir b --checkpoint.resume")
    words = ["-m", "mpmp.evaluate", "--checkpoint", "a/model.safetensors", *flags]
    run = alone(words, cwd=folder)
    assert run.rc == 0 and f"nats per token {validated['nats']:.4f}" in run.stdout, run.text


@pytest.mark.slow
def test_a_folder_of_hugging_face_says_what_ends_a_text(folder):
    exported = alone(["-m", "mpmp.checkpoint", "export", "a", "--to", "theirs"], cwd=folder)
    assert exported.rc == 0, exported.text
    said = json.dumps({"eos_token_id": list(range(256))})
    (folder / "theirs" / "generation_config.json").write_text(said)
    run = generated(folder, 1, *split("--checkpoint theirs --prompt def"))
    assert "prompt 1: 1 tokens, end of text" in run.stdout


@pytest.mark.slow
def test_a_model_of_bytes_may_have_more_rows_than_bytes(folder):
    wide = split("--model.vocabulary 320 --train.steps 1 --checkpoint.dir wide")
    trained = alone(["-m", "mpmp.train", *SMALL, *wide], cwd=folder)
    assert trained.rc == 0, trained.text
    words = split("mpmp.generate --checkpoint wide --prompt a --tokens 1000000000000")
    run = alone(["-m", *words, "--no-end"], cwd=folder)
    assert run.rc == 0 and "the context of 16 tokens is full" in run.stdout, run.text


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        many("mpmp.generate --prompt x", 2, ("needs --checkpoint",)),
        many("mpmp.generate --checkpoint a", 2, ("nothing to continue",)),
        many("mpmp.generate --checkpoint b --prompt x", 74, ("'b' does not exist",)),
        ("mpmp.generate --checkpoint . --prompt x", 78, ("holds no step",)),
        (
            "mpmp.generate --checkpoint a --prompt 0123456789abcdef",
            2,
            ("prompt 1 has 16 tokens", "context of 16"),
        ),
        many("mpmp.evaluate", 2, ("needs --checkpoint",)),
        ("mpmp.evaluate --checkpoint a --model.width 64", 2, ("width 32", "64")),
    ],
)
def test_a_mistake_is_named_in_one_line(folder, args, code, words):
    ended(alone(["-m", *split(args)], cwd=folder), code, *words)


@pytest.mark.slow
def test_ranks_end_alike_where_a_prompt_is_too_long(folder):
    words = ["-m", "mpmp.generate", "--checkpoint", "a", "--layout", "pp2", "--prompt", "x" * 99]
    run = run_ranks(2, words, cwd=folder, env=HOME, timeout=60)
    ended(run, 2, "prompt 1 has 99 tokens")


@pytest.mark.slow
def test_a_bert_is_refused_and_scored_by_its_masked_words(folder):
    bert = split("--model.kind bert --train.steps 2 --checkpoint.dir bert")
    trained = alone(["-m", "mpmp.train", *SMALL, *bert], cwd=folder)
    assert trained.rc == 0, trained.text
    asked = ["-m", "mpmp.generate", "--checkpoint", "bert", "--prompt", "x"]
    ended(alone(asked, cwd=folder), 2, "a bert sees both sides")
    run = alone(["-m", "mpmp.evaluate", "--checkpoint", "bert"], cwd=folder)
    (validated,) = events(folder / "bert", "validation")
    assert run.rc == 0 and f"nats per masked token {validated['nats']:.4f}" in run.stdout


@pytest.mark.slow
def test_the_bench_runs_ours_alone(tmp_path):
    flags = split("bench --against nothing --sizes small --tokens 4 --repeats 1 --csv rows.csv")
    run = alone(["-m", "mpmp.bench", "generate", *flags[1:]], cwd=tmp_path)
    assert run.rc == 0, run.text
    rows = (tmp_path / "rows.csv").read_text().splitlines()
    assert rows[0] == "size,ours_tokens_per_s,theirs_tokens_per_s,ratio"
    assert rows[1].startswith("small,") and float(rows[1].split(",")[1]) > 0
