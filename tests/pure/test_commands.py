"""The command line and recipes: later over earlier, and each mistake one line and code 2."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mpmp import commands, launcher
from mpmp.config import Config
from mpmp.errors import ConfigError
from mpmp.job.fault import Fault, fault_of


def parse(*arguments: str) -> Config:
    return commands.parse("mpmp.train", "Train.", Config(), arguments)


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)


def mistake(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line in which a command line is refused with code 2."""
    with pytest.raises(SystemExit) as left:
        parse(*arguments)
    said, line = capsys.readouterr()
    assert left.value.code == 2 and said == "", (left.value.code, said, line)
    assert re.fullmatch(r"\[rank 0/1 \S+\] [^\n]+\n", line), line
    return line


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "мой рецепт.toml"
    path.write_text(
        "[model]\nlayers = 6\nwidth = 96\ntied = false\n"
        "[optimizer]\nlearning_rate = 1\n"
        "[parallel]\ntensor = 2\nmicrobatches = 3\n"
        '[train]\ndtype = "bfloat16"\n'
    )
    return path


# --- what is understood ---------------------------------------------------------------------------


def test_defaults_and_flags() -> None:
    assert parse() == Config()
    config = parse("--train.steps", "5", "--model.dropout=0.1", "--model.no_tied")
    assert (config.train.steps, config.model.dropout, config.model.tied) == (5, 0.1, False)
    config = parse("--optimizer.learning-rate", "1e-4", "--checkpoint.dir", "a b")
    assert (config.optimizer.learning_rate, config.checkpoint.dir) == (1e-4, "a b")


def test_later_wins_over_earlier(recipe: Path) -> None:
    config = parse("--recipe", str(recipe))
    assert (config.model.layers, config.model.width, config.model.heads) == (6, 96, 4)
    assert (config.model.tied, config.train.dtype) == (False, "bfloat16")
    assert config.optimizer.learning_rate == 1.0
    assert (config.parallel.data, config.parallel.tensor) == (None, 2)
    config = parse("--model.layers", "8", f"--recipe={recipe}", "--parallel.tensor", "4")
    assert (config.model.layers, config.model.width, config.parallel.tensor) == (8, 96, 4)


def test_a_layout_sets_all_axes_and_no_more(recipe: Path) -> None:
    config = parse("--recipe", str(recipe), "--layout", "dp2.pp3")
    parallel = config.parallel
    assert (parallel.data, parallel.pipeline, parallel.tensor) == (2, 3, 1)
    assert parallel.microbatches == 3
    assert parse("--layout=tp2", "--parallel.tensor", "4").parallel.tensor == 4


def test_help_shows_every_setting_and_the_two_flags_of_ours(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as left:
        parse("--help")
    said = capsys.readouterr().out
    assert left.value.code == 0
    for words in ("--optimizer.learning", "--parallel.bucket", "--recipe", "--layout"):
        assert words in said, said


# --- what is not ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--trian.steps 3", "unknown flag --trian.steps; did you mean --train.steps?"),
        ("--train.step 3", "did you mean --train.steps?"),
        ("--model.no_tide", "did you mean --model.tied?"),
        ("--layuot tp2", "did you mean --layout?"),
        ("--steps=3", "unknown flag --steps"),
        ("--zzzzzz", "see --help"),
        ("--train.steps many", "many"),
        ("--train.steps 1.5", "1.5"),
        ("--train.steps", "train.steps"),
        ("--train.steps --train.batch 4", "train.steps"),
        ("--train.dtype float8", "float8"),
        ("--model.dropout much", "much"),
        ("stray", "stray"),
        ("--train.steps 3 stray words", "stray"),
        ("-x", "-x"),
        ("--train.steps 0", "train.steps must be at least 1, not 0"),
        ("--train.batch -3", "train.batch must be at least 1, not -3"),
        ("--train.minutes 0", "train.minutes must be positive"),
        ("--optimizer.learning_rate 0", "optimizer.learning_rate must be positive"),
        ("--optimizer.learning_rate -1e-3", "optimizer.learning_rate must be positive"),
        ("--optimizer.learning_rate nan", "optimizer.learning_rate must be a finite number"),
        ("--optimizer.weight_decay nan", "optimizer.weight_decay must be a finite number"),
        ("--model.dropout nan", "model.dropout must be a finite number, not nan"),
        ("--model.dropout 1", "model.dropout must lie in [0, 1)"),
        ("--comm.timeout_s nan", "comm.timeout_s must be a finite number, not nan"),
        ("--comm.timeout_s inf", "comm.timeout_s must be a finite number, not inf"),
        ("--train.minutes inf", "train.minutes must be a finite number, not inf"),
        ("--model.width 100 --model.heads 3", "multiple of model.heads 3"),
        ("--parallel.tensor 0", "parallel.tensor must be at least 1"),
        ("--checkpoint.resume", "checkpoint.resume needs checkpoint.dir"),
        ("--layout", "--layout needs a value"),
        ("--recipe", "--recipe needs a value"),
        ("--layout dp2,tp2", "write dp2.pp2.cp2.tp2.ep2"),
        ("--layout tp2.tp2", "each at most once"),
        ("--layout dp0", "not understood at 'dp0'"),
        ("--recipe nowhere.toml", "nowhere.toml cannot be read: No such file"),
        ("--recipe .", "cannot be read"),
    ],
)
def test_a_mistake_on_the_command_line(
    arguments: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in mistake(capsys, *arguments.split())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[model\nlayers = 2", "is not TOML"),
        ("layers = 2", "unknown section 'layers'"),
        ("[modle]\nlayers = 2", "unknown section 'modle'; did you mean 'model'?"),
        ("[model]\nlayer = 2", "unknown setting in [model]: 'layer'; did you mean 'layers'?"),
        ("[model.layers]\nx = 2", "model.layers must be int"),
        ("[[model]]\nlayers = 2", "model must be a section"),
        ("model = 3", "model must be a section"),
        ('[model]\nlayers = "2"', "model.layers must be int, not '2'"),
        ("[model]\nlayers = 2.0", "model.layers must be int, not 2.0"),
        ("[model]\nlayers = true", "model.layers must be int, not True"),
        ("[model]\ntied = 1", "model.tied must be bool, not 1"),
        ("[model]\ndropout = nan", "model.dropout must be a finite number, not nan"),
        ("[model]\nlayers = [2]", "model.layers must be int"),
        ("[optimizer]\nlearning_rate = false", "optimizer.learning_rate must be float"),
        ('[train]\ndtype = "half"', "train.dtype must be one of"),
        ("[train]\nsteps = 1979-05-27", "train.steps must be int"),
        ("[data]\npath = 3", "data.path must be str"),
        ("[parallel]\ntensor = 0", "parallel.tensor must be at least 1, not 0"),
        ("[train]\nsteps = " + "9" * 5000, "recipe"),
        ("[model]\nlayers = 2\nlayers = 3", "is not TOML"),
        ("x = " + "[" * 100_000, "recipe"),
        ("# " + "x" * 1_000_000 + "\n[model]\nlayers = 0", ""),
        ("[" + "a." * 500_000 + "b]", "recipe"),
        ("".join(f"k{i} = {i}\n" for i in range(80_000)), "recipe"),
        ('[model]\nname = "' + "long " * 200_000 + '"', "recipe"),
        ('[data]\npath = ["' + "long " * 200_000 + '"]', "recipe"),
        ("[" + "x" * 1_000_000 + "]", "recipe"),
        ("[" + "x" * 5_000 + "]", "unknown section"),
        ('[data]\npath = ["' + "long " * 1_000 + '"]', "data.path must be str"),
        ("x = " + "[" * 5_000, "recipe"),
    ],
    ids=lambda text: f"{' '.join(text[:40].split())} ({len(text)})",
)
@pytest.mark.timeout(20)
def test_a_mistake_in_a_recipe(
    text: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a recipe.toml"
    path.write_text(text)
    line = mistake(capsys, "--recipe", str(path))
    assert words in line
    assert len(line) < 2000, f"a line of {len(line)} characters"


def test_a_recipe_that_is_no_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "recipe.toml"
    path.write_bytes(b"\xff\xfe\x00[model]\n")
    assert "is not TOML" in mistake(capsys, "--recipe", str(path))


def test_ranks_other_than_0_speak_later(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(launcher.time, "sleep", slept.append)
    monkeypatch.setenv("PMI_RANK", "3")
    monkeypatch.setenv("PMI_SIZE", "4")
    with pytest.raises(SystemExit) as left:
        parse("--train.steps", "0")
    assert left.value.code == 2 and slept[0] == 0.3
    assert capsys.readouterr().err.startswith("[rank 3/4 ")


# --- MPMP_FAULT -----------------------------------------------------------------------------------


def test_faults() -> None:
    assert fault_of(None) is None and fault_of("") is None
    assert fault_of("raise:rank=1:step=5") == Fault("raise", 1, 5)
    assert fault_of("sleep:step=0:rank=2:seconds=0.5") == Fault("sleep", 2, 0, 0.5)


@pytest.mark.parametrize(
    "text",
    [
        "raise",
        "raise:rank=1",
        "raise:step=1",
        "raise:rank=one:step=1",
        "raise:rank=1:step=1:more=1",
        "raise:rank=1:step=1:",
        "explode:rank=1:step=1",
        ":rank=1:step=1",
        "raise:rank=1.0:step=1",
        "raise:rank=-1:step=1",
        "raise:rank=1:step=-1",
        "sleep:rank=1:step=1:seconds=long",
        "sleep:rank=1:step=1:seconds=-1",
        "sleep:rank=1:step=1:seconds=nan",
    ],
)
def test_a_fault_that_is_not_understood(text: str) -> None:
    with pytest.raises(ConfigError, match="MPMP_FAULT.*not understood"):
        fault_of(text)
