"""Jobs that die while they save, disks that fill up, damaged files: the newest good step loads."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from shlex import split

import pytest
import torch

from harness import Job, Run, run_ranks
from mpmp.checkpoint import ALONE, Found, Held, load
from mpmp.checkpoint.folder import step_folders, unfinished
from mpmp.checkpoint.points import NAMES
from mpmp.errors import ConfigError
from mpmp.job.fault import fault_of
from system.damages import FILES, FOLDERS, snapshot
from system.forgeries import FORGED
from system.small import HOME, PLANTED, SMALL, alone, ended, plant_text

EVERY = split("--train.steps 8 --checkpoint.every 2 --checkpoint.dir run")
FIRST_OF_FIRST = NAMES.index("manifest")
"""Points from here on are rank 0's alone."""


def train(n: int, *args: str, cwd: Path, **env: str) -> Run:
    words = ["-m", "mpmp.train", *SMALL, *args]
    return run_ranks(n, words, cwd=cwd, env={**HOME, **env}, timeout=120)


def newest(run: Path) -> tuple[int, tuple[str, ...]]:
    """The newest good step, every byte of it read and verified; what was passed over."""

    def everything(found: Found) -> list[Held]:
        tensors = found.contents.tensors
        return [
            Held.whole(key, torch.empty(one.shape, dtype=one.dtype)) for key, one in tensors.items()
        ]

    loaded = load(run, everything, ALONE)
    return loaded.step, loaded.skipped


# --- killed ---------------------------------------------------------------------------------------


def killed(point: str, rank: int, how: str, folder: Path) -> None:
    """A rank is killed at a point of its third save or, in the background, of one still under way.

    What loads is the newest checkpoint that is there, no older than the last one that was told.
    """
    background = "--checkpoint.background" if how == "background" else "--checkpoint.no_background"
    fault = f"kill:rank={rank}:step=5:point={point}"
    args = ["--layout", "dp2.zero1", *EVERY]
    job = train(2, *args, background, cwd=folder, MPMP_FAULT=fault)
    assert job.rc != 0 and f"kills rank {rank} at {point!r} of a save" in job.stderr, job.text
    told = [int(one) for one in re.findall(r"^saved run/step_(\d+)", job.stdout, re.MULTILINE)]
    there = [int(name[5:]) for name in step_folders(folder / "run")]
    assert newest(folder / "run") == (max(there), ()), job.text
    assert max(there) >= max(told, default=2), job.text
    if NAMES.index(point) >= NAMES.index("renamed"):
        assert max(there) > max(told), job.text


def gone_on(folder: Path) -> None:
    """Another number of ranks goes on from what is there, and leaves nothing of the dead save."""
    rest = alone(["-m", "mpmp.train", *SMALL, *EVERY, "--checkpoint.resume"], folder)
    assert rest.rc == 0 and "resumed from run/step_0000000" in rest.stdout, rest.text
    assert unfinished(folder / "run") == [] and newest(folder / "run") == (8, ())


def test_a_point_that_no_save_has_is_refused() -> None:
    with pytest.raises(ConfigError, match="no point of a save; write one of before shards, in a"):
        fault_of("kill:rank=0:step=5:point=nowhere")


@pytest.mark.parametrize(
    ("point", "rank", "how"), [("in a shard", 1, "background"), ("renamed", 0, "at once")]
)
def test_a_rank_killed_while_it_saves(point: str, rank: int, how: str, tmp_path: Path) -> None:
    plant_text(tmp_path)
    killed(point, rank, how, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("how", ["at once", "background"])
@pytest.mark.parametrize("point", NAMES)
def test_a_rank_killed_at_every_point_of_a_save(point: str, how: str, tmp_path: Path) -> None:
    for rank in range(1 if NAMES.index(point) >= FIRST_OF_FIRST else 2):
        folder = tmp_path / str(rank)
        folder.mkdir()
        plant_text(folder)
        killed(point, rank, how, folder)
    if how == "background":
        gone_on(folder)


# --- no room --------------------------------------------------------------------------------------


def without_room(how: str, run: Path, folder: Path, background: bool) -> Run:
    args = [*SMALL, *split("--layout dp2.zero1 --train.steps 8 --checkpoint.every 2")]
    args += ["--checkpoint.dir", str(run)]
    args += ["--checkpoint.background" if background else "--checkpoint.no_background"]
    return run_ranks(2, [PLANTED / "full_disk.py", how, *args], cwd=folder, env=HOME, timeout=120)


@pytest.mark.slow
@pytest.mark.parametrize("background", [True, False])
def test_a_shard_that_cannot_be_written(background: bool, tmp_path: Path) -> None:
    plant_text(tmp_path)
    job = without_room("limit", Path("run"), tmp_path, background)
    ended(job, 74, "rank 1 could not write run/step_00000004.tmp/shard_00001", "File too large")
    assert step_folders(tmp_path / "run") == ["step_00000002"]
    assert unfinished(tmp_path / "run") == [] and newest(tmp_path / "run") == (2, ())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB, in which two checkpoints have room."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("needs root, and a container that may mount")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("background", [True, False])
def test_a_disk_that_fills_up_in_a_save(background: bool, small_disk: Path, tmp_path: Path) -> None:
    plant_text(tmp_path)
    run = small_disk / "run"
    job = without_room(f"fill:{small_disk}/filler", run, tmp_path, background)
    ended(job, 74, "could not", "No space left on device")
    os.unlink(small_disk / "filler")
    assert unfinished(run) == [] and newest(run) == (2, ())


# --- two jobs -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_second_job_in_a_running_jobs_folder_is_refused(tmp_path: Path) -> None:
    plant_text(tmp_path)
    words = ["-m", "mpmp.train", *SMALL, "--checkpoint.dir", "run"]
    with Job(1, [*words, "--train.steps", "100000"], env=HOME, cwd=tmp_path) as job:
        job.wait_for("step 3/")
        second = alone([*words, "--train.steps", "5"], tmp_path)
        ended(second, 74, "another job (process", "runs in run", "--checkpoint.dir")
        pruned = alone(["-m", "mpmp.checkpoint", "prune", "run"], tmp_path)
        ended(pruned, 78, "run holds no checkpoint")
        assert job.process.poll() is None


# --- damaged --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the text and a run of steps 2 and 4, in the files of two ranks."""
    folder = tmp_path_factory.mktemp("saved")
    plant_text(folder)
    args = split("--layout dp2.zero1 --train.steps 4 --checkpoint.every 2 --checkpoint.dir run")
    job = train(2, *args, cwd=folder)
    assert job.rc == 0, job.text
    return folder


def refused(n: int, names: list[str], saved: Path, folder: Path) -> None:
    """Runs whose only checkpoint is damaged: code 78 and one sentence, the same on all ranks."""
    every = {**FILES, **FOLDERS, **FORGED}
    plant_text(folder)
    for number, name in enumerate(names):
        run = folder / str(number) / "run"
        shutil.copytree(saved / "run", run)
        every[name][0](run / "step_00000004")
        shutil.rmtree(run / "step_00000002")
        (run / ".lock").touch()
    before = snapshot(folder)
    runs = [str(folder / str(number) / "run") for number in range(len(names))]
    words = [PLANTED / "resumes.py", *SMALL, "--train.steps", "6", "/", *runs]
    job = run_ranks(n, words, cwd=folder, env=HOME, timeout=600)
    assert job.rc == 0 and job.stderr == "", job.text
    said = [json.loads(line) for line in job.stdout.splitlines() if line.startswith("[")]
    assert [run for run, _ in said] == runs, job.text
    for name, (_, ranks) in zip(names, said, strict=True):
        assert len(ranks) == n and len(set(ranks)) == 1, f"{name}: {ranks}"
        sentence = ranks[0]
        assert sentence.startswith("78 no good checkpoint in "), f"{name}: {sentence}"
        assert every[name][1] in sentence and len(sentence) < 600, f"{name}: {sentence}"
    changed = {path for path, one in snapshot(folder).items() if before.get(path) != one}
    assert all(path.endswith(".lock") for path in changed), changed


def test_damage_is_told_by_all_ranks_alike(saved: Path, tmp_path: Path) -> None:
    names = ["shard: its last bit", "shard: missing", "shards: swapped", "manifest: a bit"]
    names += ["folder: a link", "forged: file above", "shard: a pickle as long", "manifest: a pipe"]
    refused(2, names, saved, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("n", [1, 2])
def test_every_damage_is_told_by_all_ranks_alike(n: int, saved: Path, tmp_path: Path) -> None:
    refused(n, [*FILES, *FOLDERS, *FORGED], saved, tmp_path)


@pytest.mark.parametrize("n", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_damaged_checkpoint_ends_the_job_with_78(n: int, saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    for step in ("step_00000002", "step_00000004"):
        FILES["shard: a bit of its header"][0](tmp_path / "run" / step)
    words = ["-m", "mpmp.train", *SMALL, *EVERY, "--checkpoint.resume"]
    job = alone(words, tmp_path) if n == 1 else run_ranks(n, words, cwd=tmp_path, env=HOME)
    line = ended(job, 78, "no good checkpoint in run", "step_00000004: shard_00000", "block 0 of 1")
    assert line.startswith(f"[rank 0/{n} ") and "step_00000002: shard_00000" in line, job.text
