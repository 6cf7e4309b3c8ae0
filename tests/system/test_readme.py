"""What the README promises: every command in it runs, every link leads somewhere, its code is ours.

Commands are taken from README.md itself. Trainings and measurements are run as they stand there,
with a small text, model and size appended; make's targets are held against their recipes, which
are run the same way.
"""

from __future__ import annotations

import ast
import inspect
import os
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from harness import ROOT, Run, run_ranks
from mpmp import errors
from mpmp.programs.collectives import COLLECTIVES
from mpmp.programs.collectives.allreduce_ring import allreduce_ring
from mpmp.programs.tuning import Entry, Table
from system.small import HOME, SMALL, alone, plant_text

README = (ROOT / "README.md").read_text()
COLLECTIVES_PAGE = (ROOT / "docs" / "collectives.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
PAGES += sorted((ROOT / "docs").rglob("*.md"))


def blocks(kind: str, text: str = README) -> list[str]:
    """The contents of the fenced blocks of a kind."""
    return re.findall(rf"^```{kind}\n(.*?)^```$", text, re.M | re.S)


@dataclass(frozen=True)
class Command:
    """A line of the README: its words, and the exit code that its comment promises."""

    line: str

    @property
    def words(self) -> list[str]:
        return shlex.split(self.line.removeprefix("$ "), comments=True)

    @property
    def rc(self) -> int:
        promised = re.search(r"# ends with (\d+)", self.line)
        return int(promised[1]) if promised else 0

    @property
    def environment(self) -> dict[str, str]:
        return dict(word.split("=", 1) for word in self.words if re.match(r"[A-Z_]+=", word))

    def starts(self) -> tuple[int, list[str]]:
        """Ranks that it starts (0 without a launcher), and the arguments given to Python."""
        words = self.words[len(self.environment) :]
        num_ranks = 0
        if words[0] == "mpirun":
            assert words[1] == "-n", self.line
            num_ranks, words = int(words[2]), words[3:]
        assert words[:2] == ["python", "-m"], f"no command that this test knows: {self.line}"
        return num_ranks, words[1:]


COMMANDS = [
    Command(line)
    for block in blocks("(?:sh|console)")
    for line in block.splitlines()
    if line.strip() and not line.startswith("#")
]
SESSION = [command for command in COMMANDS if {"runs/a", "my-gpt"} & set(command.words)]
"""The life of one model: each command goes on with what the ones before it left."""
MAKE = [command for command in COMMANDS if command.words[0] == "make"]
TYPED = [command for command in COMMANDS if command not in [*MAKE, *SESSION]]


TINY_STEPS = shlex.split(
    "--layers 2 --width 32 --heads 2 --vocabulary 64 --context 16 --steps 2 --repeats 1"
)

TABLE = "table.json"
"""The file that the README measures in one command and chooses by in the next."""


def plant_table(folder: Path) -> None:
    """A table of one time, by which the ring is the fastest of all."""
    entry = Entry("allreduce", 2, 1, 1 << 20, "ring", 1.0, "window")
    (folder / TABLE).write_text(Table("planted", (entry,)).to_json())


def run(command: Command, folder: Path) -> Run:
    plant_text(folder)
    num_ranks, arguments = command.starts()
    if "--comm.table" in arguments:
        plant_table(folder)
    if "train" in arguments:
        arguments += TINY_STEPS
    elif "mpmp.bench" in arguments:
        arguments += ["--sizes", "1KiB", "--repeats", "2", "--seconds", "0.05"]
    elif "mpmp.verify" in arguments:
        arguments += ["--data.path", "text.txt", "--train.steps", "1", "--train.batch", "8"]
        arguments += ["--model.width", "32", "--model.context", "8"]
    elif "mpmp.checkpoint" in arguments:
        pass
    elif "mpmp.evaluate" in arguments:
        arguments += ["--train.eval_batches", "1"]
    elif "mpmp.generate" in arguments:
        arguments += ["--tokens", "8"]
    elif "tagging" in arguments:
        arguments += ["--train.epochs", "1", "--model.width", "32"]
    else:
        arguments += SMALL
        if not {"--train.steps", "--train.minutes"} & set(arguments):
            arguments += ["--train.steps", "3"]
    # One thread a rank: there are more ranks here than cores.
    env = {**HOME, "OMP_NUM_THREADS": "1", **command.environment}
    if num_ranks == 0:
        return alone(arguments, folder, env)
    return run_ranks(num_ranks, arguments, cwd=folder, env=env, timeout=150)


def recipe(target: str) -> list[str]:
    """What make would run, none of it run."""
    if shutil.which("make") is None:
        pytest.skip("optional data: no make on this machine")
    # The tests themselves may run under make, which would tell this one to name its folder.
    outer = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")
    env = {name: value for name, value in os.environ.items() if name not in outer}
    done = subprocess.run(["make", "-n", target], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def shown(command: Command) -> object:
    """A command as a case; eight ranks take long, and what they do four do, too."""
    marks = [pytest.mark.slow] if "-n 8" in command.line else []
    return pytest.param(command, marks=marks, id=" ".join(command.words))


@pytest.mark.parametrize("command", [shown(one) for one in TYPED])
def test_a_command_typed_by_hand(command: Command, tmp_path: Path) -> None:
    ended = run(command, tmp_path)
    assert ended.rc == command.rc and not ended.timed_out, ended.text
    if command.rc:
        assert ended.stderr.startswith("[rank 1/4 "), ended.text
    elif "mpmp.verify" in command.words:
        assert "verify dp" in ended.stdout, ended.text
    elif "train" in command.words:
        assert "torch pipelining" in ended.stdout, ended.text
    elif "--dry-run" in command.words:
        assert "dry run of dp2.pp2.tp4.zero1 on 16 ranks" in ended.stdout, ended.text
    elif "tagging" in command.words:
        assert "precision" in ended.stdout and "support" in ended.stdout, ended.text
    elif "mpmp.bench" in command.words:
        for collective in COLLECTIVES:
            assert f"\n{collective}\n" in ended.stdout, ended.text
        assert ("x gloo" in ended.stdout) == ("native,gloo" in command.words), ended.text
        assert (tmp_path / TABLE).exists() == (TABLE in command.words), ended.text
    else:
        if "--comm.table" in command.words:
            assert "ring, measured: " in ended.stderr, ended.text
        assert "load balance" in ended.stdout, ended.text
        assert list(tmp_path.glob("runs/*/model.safetensors")), ended.text


@pytest.mark.timeout(300)
def test_the_life_of_a_model(tmp_path: Path) -> None:
    shown = []
    for command in SESSION:
        ended = run(command, tmp_path)
        assert ended.rc == 0 and not ended.timed_out, f"{command.line}\n{ended.text}"
        shown.append(ended.stdout)
    assert "perplexity" in shown[3] and "behind them" in shown[4], shown[3:5]
    assert "resumed from runs/a/step_00000020" in shown[1]
    assert (tmp_path / "my-gpt" / "config.json").is_file()


@pytest.mark.parametrize("command", MAKE, ids=[" ".join(one.words) for one in MAKE])
def test_a_target_of_make_exists(command: Command) -> None:
    assert len(command.words) == 2 and recipe(command.words[1])


def test_make_train_runs_what_the_readme_says(tmp_path: Path) -> None:
    last = recipe("train")[-1]
    assert "source ./env.sh" in last
    command = Command(last[last.index("mpirun") :])
    assert command.line == "mpirun -n 2 python -m mpmp.train --parallel.tensor 2"
    ended = run(command, tmp_path)
    assert ended.rc == 0 and "dp1.pp1.tp2" in ended.stdout, ended.text


def test_make_test_runs_all_tests_on_both_libraries() -> None:
    lines = recipe("test")
    for environment in (".venv", ".venv-mpich"):
        assert any(line.startswith(f"{environment}/bin/python -m pytest ") for line in lines), lines


def test_the_ring_is_the_one_that_runs() -> None:
    shown = next(block for block in blocks("python") if "def allreduce_ring" in block)

    def body(source: str) -> list[str]:
        function = ast.parse(source).body[0]
        assert isinstance(function, ast.FunctionDef)
        return [ast.unparse(statement) for statement in function.body]

    assert body(shown) == body(inspect.getsource(allreduce_ring))


def test_the_programs_are_checked_simulated_and_drawn(tmp_path: Path) -> None:
    script = tmp_path / "shown.py"
    script.write_text(next(block for block in blocks("python") if "draw_collective" in block))
    ended = alone([str(script)], tmp_path)
    assert ended.rc == 0 and "0 +> 1" in ended.stdout, ended.text


def test_the_library(tmp_path: Path) -> None:
    shown = next(block for block in blocks("python") if "mpmp.mesh(data=2" in block)
    script = tmp_path / "shown.py"
    script.write_text(f"{shown}\nassert total.tolist() == 3 * [1.0 + 4 * mesh.index['data']]\n")
    ended = run_ranks(4, [script], cwd=tmp_path, env=HOME, timeout=60)
    assert ended.rc == 0 and ended.left_behind == 0, ended.text


def test_the_tensors_that_ranks_share(tmp_path: Path) -> None:
    shown = next(block for block in blocks("python") if "mesh.tensor.empty" in block)
    script = tmp_path / "shown.py"
    script.write_text(f"{shown}\nassert (x == 8).all() and second.tolist() == [1.0] * 5\n")
    ended = run_ranks(2, [script], cwd=tmp_path, env=HOME, timeout=60)
    assert ended.rc == 0 and ended.left_behind == 0, ended.text


@pytest.mark.parametrize(
    "shown",
    blocks("python", COLLECTIVES_PAGE),
    ids=lambda shown: re.findall(r"# (\w+\.py)", shown)[0],
)
def test_what_is_shown_of_the_collectives(shown: str, tmp_path: Path) -> None:
    """A block of the page starts with the name of its script and how many ranks run it."""
    name, num_ranks = re.findall(r"^# (\w+\.py)(?:, mpirun -n (\d))?\n", shown)[0]
    (tmp_path / name).write_text(shown)
    ended = (
        run_ranks(int(num_ranks), [tmp_path / name], cwd=tmp_path, env=HOME, timeout=60)
        if num_ranks
        else alone([name], tmp_path)
    )
    assert ended.rc == 0, ended.text


def rows_of(text: str) -> set[tuple[str, str]]:
    """(collective, algorithm) of the rows of a table, where an empty cell stands for the last."""
    found, collective = set(), ""
    for first, name in re.findall(r"^\| (\w*) ?\| \[?`(\w+)`", text, re.M):
        collective = first or collective
        found.add((collective, name))
    return found


ALGORITHMS = {(kind, name) for kind, algorithms in COLLECTIVES.items() for name in algorithms}


def test_every_algorithm_is_told() -> None:
    assert rows_of(README) == ALGORITHMS
    assert rows_of(COLLECTIVES_PAGE) == ALGORITHMS


def test_every_algorithm_has_had_bugs_planted() -> None:
    planted = re.findall(r"^\| (\w+) (\w+)[^|]* \| \d", COLLECTIVES_PAGE, re.M)
    assert set(planted) == ALGORITHMS


def test_every_exit_code_is_told() -> None:
    kinds = [one for one in vars(errors).values() if inspect.isclass(one)]
    codes = {int(one.exit_code) for one in kinds if issubclass(one, errors.MpmpError)}
    told = {int(code) for code in re.findall(r"\| (\d+) \|", README)}
    assert codes <= told, f"not in the README: {codes - told}"


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_every_link_leads_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    ours = [target for target in targets if not target.startswith(("http", "#"))]
    dead = [target for target in ours if not (page.parent / target.partition("#")[0]).exists()]
    assert not dead, f"{page.name} links to {dead}"


def test_the_index_names_every_page() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    pages = [page.relative_to(ROOT / "docs").as_posix() for page in PAGES if "docs" in page.parts]
    missing = [page for page in pages if page != "README.md" and f"({page})" not in index]
    assert not missing
