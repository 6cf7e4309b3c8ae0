"""python -m mpmp.checkpoint: what each verb says and does, and what it refuses."""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from shlex import split
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from harness import run_ranks
from mpmp.checkpoint import ALONE, Held, read
from mpmp.checkpoint.__main__ import VERBS, main
from mpmp.checkpoint.folder import read_manifest
from mpmp.checkpoint.inspecting import Inspect, inspect
from mpmp.checkpoint.locking import locked
from mpmp.checkpoint.merging import Merge, merge
from mpmp.checkpoint.pruning import Prune, prune
from mpmp.checkpoint.resharding import Reshard, reshard
from mpmp.checkpoint.verifying import Verify, verify
from mpmp.errors import CheckpointError, ConfigError, InputOutputError, LayoutError
from system.damages import FILES, flip, shards
from system.forgeries import forge
from system.small import HOME, PLANTED, SMALL, alone, ended, plant_text

OF_2 = ["dp2.zero3", "tp2", "dp2.ep2.zero2"]
MORE_OF_2 = ["dp2", "dp2.zero1", "pp2", "cp2", "cp2.zero1", "tp2.sp"]
ELSEWHERE = ["dp1", "pp2.tp2", "dp2.pp2.zero1", "dp2.tp2.zero3.sp"]


def trained(folder: Path, layouts: list[str]) -> Path:
    """A run of 2 ranks, with steps 1 and 2, for each layout."""
    plant_text(folder)
    common = [*SMALL, *split("--model.experts 4 --train.steps 2 --checkpoint.every 1")]
    words: list[str] = []
    for layout in layouts:
        words += ["/", *common, "--layout", layout, "--checkpoint.dir", f"{folder}/{layout}"]
    run = run_ranks(2, [PLANTED / "several.py", *words[1:]], cwd=folder, env=HOME, timeout=300)
    assert run.rc == 0 and run.stderr == "", run.text
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("runs"), OF_2)


def tensors(step: Path) -> dict[str, torch.Tensor]:
    """Everything a checkpoint holds, whole."""
    found = read_manifest(step)[1]
    every = {key: torch.empty(one.shape, dtype=one.dtype) for key, one in found.tensors.items()}
    read(found.contents(step), [Held.whole(key, one) for key, one in every.items()], ALONE)
    return every


def step(folder: Path, number: int = 2) -> Path:
    return folder / f"step_{number:08}"


# --- inspect, verify ------------------------------------------------------------------------------


def test_inspect_tells_what_there_is(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = runs / "dp2.zero3"
    inspect(Inspect(str(run)))
    said = capsys.readouterr().out
    for words in (
        f"{run}: 2 checkpoints",
        "2, save number 2 of the run",
        "by mpmp 0.1.0, format 2",
        "dp2.pp1.tp1.zero3",
        "kind gpt",
        "exp_avg_sq",
        "shard_00001.safetensors",
        f"{(step(run) / 'manifest.json').stat().st_size:,}",
    ):
        assert words in said, f"{words}\n{said}"
    assert "weight/embedding.weight" not in said
    (step(run, 1) / "manifest.json").rename(run / "aside")
    inspect(Inspect(f"{step(run)}/", tensors=True))
    inspect(Inspect(str(run)))
    (run / "aside").rename(step(run, 1) / "manifest.json")
    said = capsys.readouterr().out
    assert "weight/embedding.weight" in said and "257 x 32" in said
    assert "step_00000001 has no manifest" in said


def test_verify_reads_everything(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(runs / "tp2", tmp_path / "run")
    verify(Verify(str(run)))
    assert capsys.readouterr().out.count(": good; ") == 2
    one, other = shards(step(run))
    size = other.stat().st_size
    flip(other, 8 * size - 1)
    with pytest.raises(CheckpointError, match=r"shard_00001.*block 0 of 1.*holds .* and \d+ more"):
        verify(Verify(str(run)))
    assert "step_00000001: good; " in capsys.readouterr().out
    one.unlink()
    (step(run) / "shard_00001 (copy).safetensors").touch()
    with pytest.raises(CheckpointError, match=r"shard_00000.* No such file .*\(and 2 more\)"):
        verify(Verify(str(step(run))))
    assert "step_00000002: damaged, 3 of its files" in capsys.readouterr().out
    (step(run) / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="step_00000002 has no manifest"):
        verify(Verify(str(run)))


def test_the_end_of_the_process_tells(runs: Path, tmp_path: Path) -> None:
    run = shutil.copytree(runs / "tp2", tmp_path / "run")
    FILES["shard: a bit of its header"][0](step(run))
    bad = alone(["-m", "mpmp.checkpoint", "verify", "run"], tmp_path)
    line = ended(bad, 78, "run/step_00000002/shard_00000.safetensors is damaged in block 0 of 1")
    assert line.startswith("[rank 0/1 ")


# --- merge, reshard, prune ------------------------------------------------------------------------


def test_merge_gives_the_model_that_the_run_exported(runs: Path, tmp_path: Path) -> None:
    for layout in OF_2:
        merge(Merge(str(runs / layout), to=str(tmp_path / layout)))
        found, told = load_file(tmp_path / layout), load_file(runs / layout / "model.safetensors")
        assert found.keys() == told.keys()
        assert all(torch.equal(one, told[name]) for name, one in found.items()), layout
    with pytest.raises(ConfigError, match="is there already; name another file with --to"):
        merge(Merge(str(runs / "tp2")))
    with pytest.raises(ConfigError, match="is a folder; name the file, as in --to .*model.safet"):
        merge(Merge(str(runs / "tp2"), to=str(tmp_path)))


def test_damage_is_told_with_its_step_and_the_way_out(runs: Path, tmp_path: Path) -> None:
    run = shutil.copytree(runs / "tp2", tmp_path / "run")
    FILES["shard: a bit of its header"][0](step(run))
    said = f"{step(run)}: shard_00000.* is damaged in block 0 .*; name an older step's folder"
    with pytest.raises(CheckpointError, match=said):
        merge(Merge(str(run), to=str(tmp_path / "merged")))
    with pytest.raises(CheckpointError, match=said):
        reshard(Reshard(str(run), layout="dp1", to=str(tmp_path / "to")))


def as_written_by_a_job(run: Path, to: Path) -> None:
    """Cut anew for the layout it has: byte for byte the files that its ranks have written."""
    reshard(Reshard(str(run), layout=run.name, to=str(to / run.name)))
    for file in shards(step(run)):
        there = step(to / run.name) / file.name
        assert there.read_bytes() == file.read_bytes(), file
    assert len(shards(step(to / run.name))) == len(shards(step(run)))


def test_reshard_writes_what_ranks_would(runs: Path, tmp_path: Path) -> None:
    for layout in OF_2:
        as_written_by_a_job(runs / layout, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_reshard_writes_what_ranks_of_more_layouts_would(tmp_path: Path) -> None:
    runs = trained(tmp_path, MORE_OF_2)
    for layout in MORE_OF_2:
        as_written_by_a_job(runs / layout, tmp_path / "to")


@pytest.mark.slow
def test_reshard_changes_no_bit(runs: Path, tmp_path: Path) -> None:
    source = step(Path(shutil.copytree(runs / "tp2", tmp_path / "source")), 1)
    (source.parent / "tokenizer.json").write_text("{}")
    whole = tensors(source)
    for layout in ELSEWHERE:
        to = tmp_path / layout
        reshard(Reshard(str(source), layout=layout, to=str(to)))
        verify(Verify(str(to)))
        found = tensors(step(to, 1))
        assert found.keys() == whole.keys()
        assert all(torch.equal(one, whole[key]) for key, one in found.items()), layout
        assert (to / "tokenizer.json").read_text() == "{}"
        source = step(to, 1)  # and on from there


def test_reshard_takes_a_new_name_after_one_that_was_killed(runs: Path, tmp_path: Path) -> None:
    step(tmp_path).with_suffix(".tmp").mkdir()
    reshard(Reshard(str(runs / "tp2"), layout="dp1", to=str(tmp_path)))
    verify(Verify(f"{step(tmp_path)}.2"))


def test_reshard_looks_for_room_first(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=20_000))
    with pytest.raises(InputOutputError, match=r"step_00000002 needs .* room for 0\.02 MB"):
        reshard(Reshard(str(runs / "tp2"), layout="dp1", to=str(tmp_path / "to")))
    assert sorted(os.listdir(tmp_path / "to")) == [".lock"]


def test_reshard_cuts_by_the_bytes_of_the_dtype_that_was_saved(tmp_path: Path) -> None:
    """Buckets are as long as their bytes say, and so are the parts of them that ranks hold."""
    plant_text(tmp_path)
    words = [*SMALL, *split("--train.steps 1 --train.dtype float64 --parallel.bucket_mb 0.02")]
    words += split("--layout dp2.zero1 --checkpoint.dir dp2.zero1")
    job = run_ranks(2, ["-m", "mpmp.train", *words], cwd=tmp_path, env=HOME)
    assert job.rc == 0, job.text
    reshard(
        Reshard(str(tmp_path / "dp2.zero1"), layout="dp2.zero1", to=str(tmp_path / "to")),
    )
    for file in shards(step(tmp_path / "dp2.zero1", 1)):
        assert (step(tmp_path / "to", 1) / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c["meta"].update(config={}),
        lambda c: c["meta"].update(cut="a,b"),
        lambda c: c["tensors"]["weight/embedding.weight"].update(
            shape=[], pieces=[[0, 0, 0, 1, []]]
        ),
        lambda c: c.update(tensors={}),
    ],
    ids=["no settings", "cut", "embedding", "no tensors"],
)
def test_settings_that_make_no_sense_are_refused_in_a_sentence(
    change: Callable[[dict[str, Any]], object], runs: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(runs / "tp2", tmp_path / "run")
    forge(change, step(run))
    inspect(Inspect(str(step(run)), tensors=True))
    with pytest.raises(CheckpointError, match="does not say how its model is made"):
        reshard(Reshard(str(step(run)), layout="pp2", to=str(tmp_path / "to")))
    merge(Merge(str(step(run)), to=str(tmp_path / "merged")))


@pytest.mark.slow
def test_a_job_goes_on_from_what_was_cut_anew(runs: Path, tmp_path: Path) -> None:
    plant_text(tmp_path)
    reshard(Reshard(str(runs / "dp2.zero3"), layout="tp2", to=str(tmp_path / "run")))
    words = [*SMALL, *split("--model.experts 4 --layout tp2 --train.steps 3 --checkpoint.dir run")]
    job = run_ranks(2, ["-m", "mpmp.train", *words, "--checkpoint.resume"], cwd=tmp_path, env=HOME)
    assert job.rc == 0 and "resumed from run/step_00000002 after step 2" in job.stdout, job.text


def test_reshard_refuses_what_cannot_be(runs: Path, tmp_path: Path) -> None:
    run = str(runs / "tp2")
    with pytest.raises(ConfigError, match="--layout dp2.tp2.zero3 --to DIR"):
        reshard(Reshard(run, layout="tp2"))
    with pytest.raises(ConfigError, match="'xp3' is not understood"):
        reshard(Reshard(run, layout="xp3", to=str(tmp_path / "new")))
    for layout in ("tp8", "pp5", "sp"):
        with pytest.raises(LayoutError):
            reshard(Reshard(run, layout=layout, to=str(tmp_path / "new")))
    assert not (tmp_path / "new").exists()


def test_prune_says_what_goes(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(runs / "tp2", tmp_path / "run")
    (run / "step_00000003.tmp").mkdir()
    prune(Prune(str(run), keep=1, dry_run=True))
    assert "would remove" in capsys.readouterr().out and step(run, 1).exists()
    with locked(run, ALONE), pytest.raises(InputOutputError, match="another job"):
        prune(Prune(str(run), keep=1))
    prune(Prune(str(run), keep=1))
    said = capsys.readouterr().out
    assert said == f"removed {step(run, 1)}\nremoved {step(run, 3)}.tmp\n1 stay in {run}\n"
    assert sorted(one.name for one in run.glob("step_*")) == ["step_00000002"]
    with pytest.raises(ConfigError, match="at least 1"):
        prune(Prune(str(run), keep=0))
    with pytest.raises(ConfigError, match="not that of one step"):
        prune(Prune(str(step(run))))


# --- wrong usage ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ("", 2, "one of inspect, verify, merge, reshard, prune"),
        ("verfy run", 2, "not 'verfy'; did you mean verify?"),
        ("verify", 2, "verify needs the folder of a run or of a step"),
        ("inspect run --tensor", 2, "no option --tensor; did you mean --tensors?"),
        ("prune run --kep 3", 2, "no option --kep; did you mean --keep?"),
        ("prune run --keep two", 2, "--keep"),
        ("verify run --fast", 2, "verify has no option --fast; known are --folder, --help"),
        ("verify run other", 2, "verify takes one folder, not 2: run, other"),
    ],
)
def test_wrong_usage_is_one_line(
    words: str,
    code: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["checkpoint", *words.split()])
    with pytest.raises(SystemExit) as left:
        main()
    err = capsys.readouterr().err
    assert left.value.code == code and err.count("\n") == 1 and said in err, err


def test_a_step_that_goes_meanwhile_is_told(runs: Path, tmp_path: Path) -> None:
    """The job that runs there prunes it."""
    shutil.copytree(runs / "tp2", tmp_path / "run")
    pruned = alone([str(PLANTED / "pruned_meanwhile.py"), "verify", "run"], tmp_path)
    ended(pruned, 74, "verify run failed: No such file", "was the step pruned meanwhile?")


def test_several_processes_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["checkpoint", "verify", "run"])
    monkeypatch.setattr("mpmp.checkpoint.__main__.told_size", lambda: 2)
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 3 and "leave mpirun out" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_help_tells_every_verb_and_option(
    verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["checkpoint", *verb.split(), "--help"])
    with pytest.raises(SystemExit) as left:
        main()
    said = capsys.readouterr().out
    options = [one.name for one in dataclasses.fields(VERBS[verb].asked)] if verb else []
    words = [f"--{name}" for name in options if name != "folder"] if verb else list(VERBS)
    assert left.value.code == 0 and all(word in said for word in ["folder", *words]), said


def test_what_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputOutputError, match="is not a folder"):
        verify(Verify(str(tmp_path / "absent")))
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        verify(Verify(str(tmp_path)))
