"""Saving and loading on one rank: bits kept, a good checkpoint at every moment, old ones pruned."""

import errno
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

import mpmp.checkpoint
from mpmp.checkpoint import (
    ALONE,
    Found,
    Held,
    Loaded,
    Saver,
    alone,
    export,
    load,
    locked,
    locking,
    points,
    save,
)
from mpmp.checkpoint import folder as run_folder
from mpmp.errors import CheckpointError, InputOutputError, TensorError

META = {"position": 640, "loss": 2.718281828459045, "seeds": {"10": 1, "9": 2}}
SHARD = "shard_00000.safetensors"


def content(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    weight = torch.randn(300, 41, generator=generator)
    return {
        "weight": weight,
        "adam.weight": weight.to(torch.bfloat16),
        "count": torch.tensor(step),
        "empty": torch.empty(0, 3),
    }


def whole(tensors: dict[str, Tensor]) -> list[Held]:
    return [Held.whole(name, tensor) for name, tensor in tensors.items()]


def save_step(folder: Path, step: int, keep: int = 2) -> Path:
    return save(folder, step, whole(content(step)), META, ALONE, keep)


def load_all(folder: Path) -> tuple[Loaded, dict[str, Tensor]]:
    """The newest good checkpoint, and all that it holds."""
    tensors: dict[str, Tensor] = {}

    def wants(found: Found) -> list[Held]:
        tensors.clear()
        for key, one in found.contents.tensors.items():
            tensors[key] = torch.empty(one.shape, dtype=one.dtype)
        return whole(tensors)

    return load(folder, wants, ALONE), tensors


def assert_holds(folder: Path, step: int) -> tuple[str, ...]:
    """The newest good checkpoint is this step's, bit for bit; what was skipped."""
    loaded, tensors = load_all(folder)
    assert loaded.step == step
    assert tensors.keys() == content(step).keys()
    for name, tensor in content(step).items():
        assert tensors[name].dtype == tensor.dtype and torch.equal(tensors[name], tensor)
    assert loaded.meta == META
    return loaded.skipped


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


# --- round trips and what is kept -----------------------------------------------------------------


def test_what_was_saved_comes_back_bit_for_bit(tmp_path: Path) -> None:
    folder = tmp_path / "läufe mit leerzeichen" / "a"
    path = save_step(folder, 12)
    assert path == folder / "step_00000012"
    assert names(path) == ["manifest.json", "shard_00000.safetensors"]
    assert names(folder) == ["latest", "step_00000012"]
    assert (folder / "latest").read_text() == "step_00000012\n"
    assert assert_holds(folder, 12) == ()


def test_a_shard_of_many_blocks(tmp_path: Path) -> None:
    big = {"x": torch.arange(3_000_001, dtype=torch.int32), "y": torch.arange(7.0)}
    save(tmp_path, 1, whole(big), {}, ALONE, 1)
    found = load_all(tmp_path)[1]
    assert torch.equal(found["x"], big["x"]) and torch.equal(found["y"], big["y"])


def test_no_tensors_and_no_meta(tmp_path: Path) -> None:
    path = save(tmp_path, 0, [], {}, ALONE, 1)
    loaded, tensors = load_all(tmp_path)
    assert (loaded.step, tensors, loaded.meta) == (0, {}, {})
    assert names(path) == ["manifest.json"]


def test_meta_comes_back_as_json_has_it(tmp_path: Path) -> None:
    save(tmp_path, 1, [], {"pair": (1, 2), "by": {10: "a", 9: "b"}, "name": "ß"}, ALONE, 1)
    assert load_all(tmp_path)[0].meta == {
        "pair": [1, 2],
        "by": {"10": "a", "9": "b"},
        "name": "ß",
    }
    with pytest.raises(ValueError):
        save(tmp_path, 2, [], {"loss": float("nan")}, ALONE, 1)


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    (tmp_path / "step_00000003.tmp").mkdir()
    (tmp_path / "step_99.txt").write_text("not ours")
    for step in (10, 20, 30, 40):
        save_step(tmp_path, step, keep=3)
    assert names(tmp_path) == [
        "latest",
        "step_00000020",
        "step_00000030",
        "step_00000040",
        "step_99.txt",
    ]
    save_step(tmp_path, 50, keep=1)
    assert names(tmp_path) == ["latest", "step_00000050", "step_99.txt"]
    assert_holds(tmp_path, 50)


def test_a_step_saved_again_stands_beside_the_first(tmp_path: Path) -> None:
    save_step(tmp_path, 10)
    save(tmp_path, 10, whole({"x": torch.ones(1)}), {}, ALONE, 2)
    assert names(tmp_path) == ["latest", "step_00000010", "step_00000010.2"]
    assert list(load_all(tmp_path)[1]) == ["x"]
    save_step(tmp_path, 10, keep=1)
    assert names(tmp_path) == ["latest", "step_00000010.3"]
    assert_holds(tmp_path, 10)


def test_newest_is_what_was_saved_last_not_what_has_the_highest_step(tmp_path: Path) -> None:
    """A run begun anew where an older one came to step 100 must not be pruned, nor passed over."""
    save_step(tmp_path, 90)
    save_step(tmp_path, 100)
    save_step(tmp_path, 5)
    assert_holds(tmp_path, 5)
    save_step(tmp_path, 10)
    assert names(tmp_path) == ["latest", "step_00000005", "step_00000010"]


def test_prune_counts_no_truncated_checkpoint(tmp_path: Path) -> None:
    save_step(tmp_path, 10)
    save_step(tmp_path, 20)
    os.truncate(tmp_path / "step_00000020" / "shard_00000.safetensors", 100)
    save_step(tmp_path, 30)
    assert names(tmp_path) == ["latest", "step_00000010", "step_00000030"]


def test_what_cannot_be_removed_ends_no_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on NFS, where a file that somebody has open leaves another name in its folder."""
    for step in (10, 20):
        save_step(tmp_path, step)

    def busy(path: Path) -> None:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", busy)
        save_step(tmp_path, 30)
        save_step(tmp_path, 10)
        assert_holds(tmp_path, 10)
    left = ["step_00000010.2", "step_00000010.tmp", "step_00000020.tmp", "step_00000030"]
    assert names(tmp_path) == ["latest", *left]
    save_step(tmp_path, 40)
    assert names(tmp_path) == ["latest", "step_00000010.2", "step_00000040"]


def test_a_manifest_that_the_disk_does_not_give_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (10, 20):
        save_step(tmp_path, step)
    original = run_folder.read_manifest

    def lost(step: Path) -> Any:
        if step.name == "step_00000010":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return original(step)

    monkeypatch.setattr(run_folder, "read_manifest", lost)
    assert run_folder.doomed(tmp_path, 1) == []
    save_step(tmp_path, 30, keep=1)
    assert names(tmp_path) == ["latest", "step_00000010", "step_00000030"]


def test_what_loading_found_damaged_is_not_counted_among_those_to_keep(tmp_path: Path) -> None:
    for step in (10, 20):
        save_step(tmp_path, step)
    shard = tmp_path / "step_00000020" / SHARD
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x55")
    loaded, _ = load_all(tmp_path)
    assert (loaded.step, loaded.damaged) == (10, ("step_00000020",))
    saver = Saver(tmp_path, ALONE, 2, background=False)
    saver.distrust(loaded.damaged)
    found = []
    for step in (30, 40):
        saver.begin(step, whole(content(step)), META)
        saver.finish()
        found.append([name[-2:] for name in names(tmp_path) if name != "latest"])
    assert found == [["10", "20", "30"], ["30", "40"]]


def test_links_are_removed_and_not_followed_by_prune(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("text")
    run = tmp_path / "run"
    run.mkdir()
    (run / "step_00000001.tmp").symlink_to(precious)
    save_step(run, 2)
    assert names(run) == ["latest", "step_00000002"]
    assert (precious / "file").read_text() == "text"


def test_a_part_of_another_dtype_and_strides(tmp_path: Path) -> None:
    save_step(tmp_path, 3)
    part = torch.zeros(20, 90, dtype=torch.float64)
    box = ((150, 240), (7, 27))
    loaded = load(tmp_path, lambda _: [Held("weight", (300, 41), box, part.t())], ALONE)
    assert torch.equal(part.t(), content(3)["weight"][150:240, 7:27].double())
    assert loaded.read_bytes <= (tmp_path / "step_00000003" / SHARD).stat().st_size


@pytest.mark.parametrize(
    "key, shape, words",
    [("bias", (3,), "no such tensor"), ("weight", (300, 42), r"of shape \(300, 41\)")],
)
def test_a_tensor_of_another_model(
    tmp_path: Path, key: str, shape: tuple[int, ...], words: str
) -> None:
    """No reason to fall back to an older step."""
    save_step(tmp_path, 3)
    save_step(tmp_path, 4)
    with pytest.raises(CheckpointError, match=f"another model: {key} .*{words}"):
        load(tmp_path, lambda _: whole({key: torch.empty(shape)}), ALONE)


@pytest.mark.parametrize("there", [True, False])
def test_nothing_there(tmp_path: Path, there: bool) -> None:
    folder = tmp_path if there else tmp_path / "absent"
    with pytest.raises(CheckpointError, match="no checkpoint in .*--checkpoint.resume"):
        load_all(folder)


# --- killed at every line ---------------------------------------------------------------------


def killed_at_line(number: int, work: Callable[[], object]) -> bool:
    """Do the work in a child that vanishes before its N-th line of mpmp.checkpoint; if it did."""
    home = os.path.dirname(mpmp.checkpoint.__file__)
    count = 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal count
        if not frame.f_code.co_filename.startswith(home):
            return None
        if event == "line":
            count += 1
            if count == number:
                os._exit(9)
        return trace

    child = os.fork()
    if child == 0:
        try:
            sys.settrace(trace)
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9)
    return code == 9


@pytest.fixture
def memory() -> Iterator[Path]:
    """A folder where fsync costs nothing: a kill loses nothing that was written, synced or not."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as path:
        yield Path(path)


@pytest.mark.parametrize("keep, stride", [(1, 11), (2, 29)])
def test_killed_at_any_line_of_a_save_the_newest_good_step_is_found(
    memory: Path, keep: int, stride: int
) -> None:
    before = memory / "before"
    save_step(before, 10)
    save_step(before, 20)
    line, run, found = 1, memory / "run", []
    while True:
        shutil.copytree(before, run)
        if not killed_at_line(line, lambda: save_step(run, 30, keep)):
            break
        renamed = (run / "step_00000030").exists()
        assert assert_holds(run, 30 if renamed else 20) == ()
        assert (run / "latest").read_text() in ("step_00000020\n", "step_00000030\n")
        found.append(renamed)
        if len(found) % 10 == 0:  # the next job cleans up
            save_step(run, 40, keep=1)
            assert names(run) == ["latest", "step_00000040"]
        shutil.rmtree(run)
        line += stride
    assert found == sorted(found) and True in found and found.count(False) > 100 / stride


def test_killed_at_any_line_of_the_first_save_there_is_a_checkpoint_or_none(memory: Path) -> None:
    line, run = 1, memory / "run"
    while killed_at_line(line, lambda: save_step(run, 1)):
        if (run / "step_00000001").exists():
            assert assert_holds(run, 1) == ()
        else:
            with pytest.raises(CheckpointError, match="no checkpoint in"):
                load_all(run)
        shutil.rmtree(run, ignore_errors=True)
        line += 29
    assert line > 100


# --- the disk says no ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fsync", "rename", "replace", "mkdir", "open", "listdir"])
def test_an_error_of_any_call_is_told_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    original = getattr(os, name)
    for number in range(1, 100):
        run, calls = tmp_path / str(number), 0
        save_step(run, 10)

        def fails(*args: Any, number: int = number, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == number:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return original(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(os, name, fails)
            try:
                save_step(run, 20)
            except InputOutputError as error:
                assert "rank 0 could not" in str(error) and "No space left" in str(error)
                assert str(run) in str(error) and error.exit_code == 74
            if calls < number:
                assert number > 1
                return
        assert not (run / "step_00000020.tmp").exists()
        assert_holds(run, 20 if (run / "step_00000020").exists() else 10)


def test_no_room_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = SimpleNamespace(total=10**9, used=10**9, free=20_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(
        InputOutputError, match=r"step_00000010 needs 0\.07 MB .* room for 0\.02 MB"
    ):
        save_step(tmp_path, 10)
    assert names(tmp_path) == []


def test_a_write_that_is_cut_short_leaves_nothing(tmp_path: Path) -> None:
    """The kernel refuses to let the shard grow beyond 50 KB: a write that fails half-way."""
    save_step(tmp_path, 10)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(InputOutputError, match="could not write .*shard_00000.*too large"):
            save_step(tmp_path, 20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(tmp_path) == ["latest", "step_00000010"]
    assert_holds(tmp_path, 10)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 200 KB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "none", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("needs root, and a container that may mount")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_fills_up(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (10, 20):
        save_step(small_disk, step)
    for step in (30, 40):
        with pytest.raises(InputOutputError, match="needs .* has room for"):
            save_step(small_disk, step)
        with monkeypatch.context() as patch:  # room that another job takes meanwhile
            patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**9))
            with pytest.raises(InputOutputError, match="No space left on device"):
                save_step(small_disk, step)
    assert names(small_disk) == ["latest", "step_00000010", "step_00000020"]
    assert_holds(small_disk, 20)


@pytest.mark.parametrize("folder", ["/proc/run", "/dev/null", "/dev/null/run"])
def test_a_folder_that_cannot_be_is_named(folder: str) -> None:
    for work in (
        lambda: save_step(Path(folder), 1),
        lambda: locked(Path(folder), ALONE).__enter__(),
    ):
        with pytest.raises(InputOutputError, match=f"rank 0 could not .*{folder}"):
            work()


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(TensorError, match="phase"):
        save(tmp_path, 1, whole({"phase": torch.zeros(2, dtype=torch.complex64)}), {}, ALONE, 1)
    assert names(tmp_path) == []


# --- in the background ----------------------------------------------------------------------------


def wait_until_done(saver: Saver) -> None:
    limit_s = time.monotonic() + 60
    while not saver.done():
        assert time.monotonic() < limit_s
        time.sleep(0.001)


def test_what_was_is_saved_while_steps_go_on(tmp_path: Path) -> None:
    saver = Saver(tmp_path, ALONE, 2, background=True)
    for step in (10, 20, 30):
        tensors = content(step)
        assert not saver.done()
        saver.begin(step, whole(tensors), META)
        for one in tensors.values():
            one.zero_()
        wait_until_done(saver)
        assert saver.settle() is None
        wait_until_done(saver)
        assert saver.settle() == tmp_path / f"step_{step:08}" and not saver.done()
        assert assert_holds(tmp_path, step) == ()
    assert names(tmp_path) == ["latest", "step_00000020", "step_00000030"]


def test_an_end_waits_for_a_save(tmp_path: Path) -> None:
    saver = Saver(tmp_path, ALONE, 2, background=True)
    assert saver.finish() is None
    saver.begin(10, whole(content(10)), META)
    assert saver.finish() == tmp_path / "step_00000010" and saver.finish() is None
    assert_holds(tmp_path, 10)


def test_a_failed_write_is_told_when_it_is_settled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_step(tmp_path, 10)
    saver = Saver(tmp_path, ALONE, 2, background=True)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        saver.begin(20, whole(content(20)), META)
        wait_until_done(saver)
        with pytest.raises(InputOutputError, match=f"could not write .*{SHARD}: No space left"):
            saver.settle()
    assert names(tmp_path) == ["latest", "step_00000010"] and not saver.done()
    saver.begin(20, whole(content(20)), META)
    assert saver.finish() is not None
    assert_holds(tmp_path, 20)


@pytest.mark.parametrize("background", [False, True])
def test_the_points_of_a_save_come_in_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, background: bool
) -> None:
    save_step(tmp_path, 10)
    passed: list[str] = []
    monkeypatch.setattr(points, "hook", passed.append)
    saver = Saver(tmp_path, ALONE, 1, background=background)
    saver.begin(20, whole(content(20)), META)
    saver.finish()
    assert list(dict.fromkeys(passed)) == list(points.NAMES)


# --- one job on a folder --------------------------------------------------------------------------


def test_a_second_job_is_refused_and_told_by_whom(tmp_path: Path) -> None:
    run = tmp_path / "run"
    refused = pytest.raises(InputOutputError, match=rf"process {os.getpid()} on .*checkpoint\.dir")
    with locked(run, ALONE):
        with refused, locked(run, ALONE):
            pass
        save_step(run, 1)
    with locked(run, ALONE):
        assert_holds(run, 1)


def test_a_folder_that_is_there_asks_nothing_of_the_one_above(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which others may own, and let nobody read."""

    def refused(folder: Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))

    monkeypatch.setattr(locking, "sync_folder", refused)
    with locked(tmp_path, ALONE):
        pass


def test_a_job_that_fails_keeps_its_lock_until_the_process_ends(tmp_path: Path) -> None:
    """Its thread may still be publishing a save."""
    job = alone.alone()
    with pytest.raises(ZeroDivisionError), locked(tmp_path, job):
        raise ZeroDivisionError
    with pytest.raises(InputOutputError, match="another job"), locked(tmp_path, ALONE):
        pass


def test_a_killed_job_leaves_no_lock(tmp_path: Path) -> None:
    def hold() -> None:
        locked(tmp_path, ALONE).__enter__()
        os._exit(9)

    assert killed_at_line(10**9, hold)
    with locked(tmp_path, ALONE):
        pass


# --- the merged model -----------------------------------------------------------------------------


def test_the_exported_file_is_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "new" / "model.safetensors"
    export(path, content(1), {"layout": "dp1.pp1.tp1"}, ALONE)
    with safe_open(str(path), "pt") as file:
        assert file.metadata() == {"format": "pt", "layout": "dp1.pp1.tp1"}
        assert all(torch.equal(file.get_tensor(name), one) for name, one in content(1).items())
    assert names(path.parent) == ["model.safetensors"]


def test_a_failed_export_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.safetensors"
    export(path, content(1), {}, ALONE)
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        InputOutputError, match="rank 0 could not write .*model.safetensors: No space"
    ):
        export(path, content(2), {}, ALONE)
    assert path.read_bytes() == before and names(tmp_path) == ["model.safetensors"]
