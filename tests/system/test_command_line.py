"""Commands as they are typed: help without MPI, and each mistake one line and its code.

What can be seen without ranks is in tests/pure/test_commands.py.
"""

from __future__ import annotations

from pathlib import Path
from shlex import split

import pytest

from harness import Run, run_ranks
from system.small import HOME, SMALL, alone, ended, events, plant_text

TRAIN = ["-m", "mpmp.train", *SMALL, "--train.steps", "2"]


def run_on(n: int, args: list[str], cwd: Path) -> Run:
    return alone(args, cwd) if n == 1 else run_ranks(n, args, env=HOME, cwd=cwd)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    plant_text(tmp_path)
    return tmp_path


# --- without MPI ----------------------------------------------------------------------------------


@pytest.fixture
def no_mpi(tmp_path: Path) -> dict[str, str | None]:
    """An environment in which mpi4py is there and MPI is not."""
    package = tmp_path / "broken" / "mpi4py"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("class rc: pass\n")
    (package / "MPI.py").write_text("raise RuntimeError('cannot load MPI library')\n")
    return {"PYTHONPATH": f"{package.parent}:{HOME['PYTHONPATH']}"}


@pytest.mark.parametrize("command", ["train", "verify"])
def test_help_needs_no_mpi(command: str, no_mpi: dict[str, str | None], tmp_path: Path) -> None:
    run = alone(["-m", f"mpmp.{command}", "--help"], tmp_path, no_mpi)
    assert run.rc == 0 and run.stderr == "" and "--parallel.tensor" in run.stdout, run.text


@pytest.mark.parametrize("command", ["train", "verify"])
def test_a_machine_without_mpi_is_told_so(
    command: str, no_mpi: dict[str, str | None], tmp_path: Path
) -> None:
    run = alone(["-m", f"mpmp.{command}"], tmp_path, no_mpi)
    assert run.rc == 3 and run.stderr.count("\n") == 1, run.text
    assert "MPI cannot be loaded" in run.stderr and "pip install" in run.stderr, run.text


@pytest.mark.mpich_too
def test_help_is_shown_once(tmp_path: Path) -> None:
    run = run_ranks(2, ["-m", "mpmp.train", "--help"], env=HOME, cwd=tmp_path)
    assert run.rc == 0 and run.stderr == "" and run.stdout.count("usage:") == 1, run.text


# --- mistakes seen before MPI starts --------------------------------------------------------------


@pytest.mark.parametrize("n", [1, pytest.param(2, marks=pytest.mark.mpich_too)])
@pytest.mark.parametrize(
    ("command", "args", "words"),
    [
        ("train", "--optimizer.learning_rate nan", "learning_rate must be a finite number"),
        ("train", "--recipe recipe.toml", "recipe.toml is not TOML"),
        ("verify", "--trian.steps 4", "did you mean --train.steps?"),
        ("verify", "--layout", "--layout needs a value"),
    ],
    ids=["number", "recipe", "flag", "layout"],
)
def test_a_mistake_is_one_line(n: int, command: str, args: str, words: str, folder: Path) -> None:
    (folder / "recipe.toml").write_text("[model")
    run = run_on(n, ["-m", f"mpmp.{command}", *args.split()], folder)
    assert ended(run, 2, words).startswith(f"[rank 0/{n} "), run.text


# --- mistakes that show later ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "args", "code", "words"),
    [
        pytest.param(
            3,
            "--parallel.tensor 2",
            3,
            "layout dp1.pp1.tp2 needs 2 ranks but 3 were started; legal layouts for 3: "
            "dp1.pp1.tp3, dp1.pp3.tp1, dp3.pp1.tp1",
            marks=pytest.mark.mpich_too,
        ),
        (
            1,
            "--layout tp2",
            3,
            "needs 2 ranks but 1 were started; legal layouts for 1: dp1.pp1.tp1",
        ),
        pytest.param(
            2, "--train.batch 1", 3, "use --train.batch 2 or more", marks=pytest.mark.slow
        ),
        pytest.param(
            2,
            "--layout pp2 --parallel.microbatches 9",
            3,
            "use --train.batch 9 or more",
            marks=pytest.mark.slow,
        ),
        (2, "--data.path nowhere", 74, "data.path 'nowhere' does not exist"),
        pytest.param(
            1,
            "--data.path nowhere",
            74,
            "data.path 'nowhere' does not exist",
            marks=pytest.mark.slow,
        ),
        (1, "--data.path empty.txt", 74, "'empty.txt' is empty"),
        pytest.param(
            1, "--data.path bytes.txt", 74, "'bytes.txt' is not UTF-8", marks=pytest.mark.slow
        ),
        (1, "--data.path short.txt", 2, "a batch needs 8"),
        (1, "--data.tokenizer text.txt", 2, "is no tokenizer file"),
        pytest.param(
            1,
            "--data.tokenizer nowhere",
            74,
            "data.tokenizer 'nowhere' cannot be read",
            marks=pytest.mark.slow,
        ),
        (2, "--comm.allreduce bubble", 2, "ring"),
        (1, "--parallel.schedule zero", 2, "1f1b"),
        (2, "--checkpoint.dir text.txt", 74, "text.txt"),
        (1, "--checkpoint.dir new --checkpoint.resume", 78, "no checkpoint in new"),
    ],
    ids=lambda value: str(value) if value in (1, 2, 3) or str(value)[:2] == "--" else "",
)
def test_a_mistake_that_shows_later(n: int, args: str, code: int, words: str, folder: Path) -> None:
    (folder / "empty.txt").touch()
    (folder / "bytes.txt").write_bytes(b"text \xff\xfe")
    (folder / "short.txt").write_text("too short for a batch\n" * 9)
    run = run_on(n, [*TRAIN, "--checkpoint.dir", "run", *args.split()], folder)
    ended(run, code, words)
    assert not (folder / "run").exists(), "a run that never began has a folder"


def test_a_run_folder_that_cannot_be_made(folder: Path) -> None:
    # Root may write anywhere, so a file stands where the folder would be made.
    (folder / "runs").touch()
    run = run_ranks(2, TRAIN, env=HOME, cwd=folder)
    ended(run, 74, "runs/")


@pytest.mark.parametrize(
    "taken", ["metrics.jsonl", pytest.param("model.safetensors", marks=pytest.mark.slow)]
)
def test_a_file_that_cannot_be_written(taken: str, folder: Path) -> None:
    (folder / "run" / taken).mkdir(parents=True)
    run = run_ranks(2, [*TRAIN, "--checkpoint.dir", "run"], env=HOME, cwd=folder)
    ended(run, 74, taken)


def test_two_jobs_on_one_folder(folder: Path) -> None:
    from harness import Job

    args = [*TRAIN, "--checkpoint.dir", "run"]
    with Job(1, [*args, "--train.steps", "1000000"], env=HOME, cwd=folder) as job:
        job.wait_for("step 3/")
        ended(alone(args, folder), 74, "another job", "--checkpoint.dir")
        assert job.process.poll() is None, job.stderr


# --- two doors ------------------------------------------------------------------------------------


def test_a_recipe_and_flags_in_folders_of_other_alphabets(folder: Path) -> None:
    place = folder / "место с пробелом 文"
    place.mkdir()
    plant_text(place, "текст.txt")
    (place / "рецепт.toml").write_text(
        '[data]\npath = "текст.txt"\n[model]\nlayers = 3\nwidth = 64\n[parallel]\ntensor = 2\n'
        '[train]\nsteps = 9\nbatch = 4\nsample_tokens = 0\neval_batches = 1\ndtype = "float64"\n'
    )
    args = split("--recipe рецепт.toml --model.width 32 --model.context 16 --train.steps 3")
    run = run_ranks(2, ["-m", "mpmp.train", *args], env=HOME, cwd=place)
    assert run.rc == 0 and run.stderr == "", run.text
    assert "3 layers, 4 heads, width 32" in run.stdout and "dp1.pp1.tp2" in run.stdout, run.text
    assert "float64" in run.stdout, run.text
    (found,) = (place / "runs").iterdir()
    assert len(events(found, "step")) == 3 and f"run: runs/{found.name}" in run.stdout, run.text
