"""Damaged, foreign and forged checkpoints: none is loaded, the step before it is."""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mpmp.checkpoint import load, manifest, save
from mpmp.checkpoint.blocks import BlockWriter
from mpmp.checkpoint.folder import read_manifest
from mpmp.config import parse_layout
from mpmp.errors import CheckpointError

SHARD = "shard_pp000_tp000.safetensors"


def alone() -> Any:
    """A mesh of one rank, without MPI."""
    index = {"data": 0, "pipeline": 0, "tensor": 0}
    everyone = SimpleNamespace(rank=0, size=1)
    return SimpleNamespace(layout="dp1.pp1.tp1", index=index, everyone=everyone)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Steps 10 and 20; the second is what tests damage. Its shard has three blocks."""
    folder = tmp_path / "run"
    for step in (10, 20):
        big = torch.full((300_001,), float(step), dtype=torch.float64)
        save(folder, step, {"big": big, "small": torch.arange(5)}, {"step": step}, alone(), 2)
    return folder


def new(run: Path) -> Path:
    return run / "step_00000020"


def assert_falls_back(run: Path, *words: str) -> None:
    """Step 10 is loaded and one sentence says why step 20 was not."""
    loaded = load(run, alone())
    assert loaded.step == loaded.meta["step"] == 10 and bool((loaded.tensors["big"] == 10).all())
    (sentence,) = loaded.skipped
    for word in ("step_00000020", *words):
        assert word in sentence, sentence


def flip(path: Path, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


# --- flipped bits ---------------------------------------------------------------------------------


def test_one_flipped_bit_anywhere_in_a_shard_is_found(run: Path) -> None:
    path, chance = new(run) / SHARD, random.Random(1)
    num_bits = 8 * path.stat().st_size
    header = [chance.randrange(8 * 200) for _ in range(50)]
    for bit in [0, num_bits - 1, *header, *(chance.randrange(num_bits) for _ in range(150))]:
        flip(path, bit)
        assert_falls_back(run, SHARD, f"block {bit // 8 >> 20} of 3", "SHA-256")
        flip(path, bit)
    assert load(run, alone()).step == 20


def test_one_flipped_bit_anywhere_in_a_manifest_is_found(run: Path) -> None:
    path = new(run) / "manifest.json"
    for bit in range(8 * path.stat().st_size):
        flip(path, bit)
        with pytest.raises(CheckpointError, match="manifest"):
            read_manifest(path.parent)
        if bit % 97 == 0:
            assert_falls_back(run, "manifest")
        flip(path, bit)
    assert load(run, alone()).step == 20


def test_with_no_good_step_each_is_named_with_its_reason(run: Path) -> None:
    flip(new(run) / SHARD, 77)
    (run / "step_00000010" / SHARD).unlink()
    with pytest.raises(CheckpointError, match="no good checkpoint") as caught:
        load(run, alone())
    assert caught.value.exit_code == 78
    for words in ("step_00000020", "block 0 of 3", "step_00000010", "No such file"):
        assert words in str(caught.value)


# --- files that are gone, cut, foreign, or no files -----------------------------------------------


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def lengthen(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\0")


def empty(path: Path) -> None:
    os.truncate(path, 0)


def rename(path: Path) -> None:
    path.rename(path.with_name("shard_pp000_tp001.safetensors"))


def older(path: Path) -> None:
    shutil.copy(path.parent.parent / "step_00000010" / path.name, path)


def pickle(path: Path) -> None:
    torch.save({"big": torch.zeros(3)}, path)


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def link(path: Path) -> None:
    moved = path.parent.parent.parent / "elsewhere"
    path.rename(moved)
    path.symlink_to(moved)


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    "damage, words",
    [
        (cut, "bytes and was saved with"),
        (lengthen, "bytes and was saved with"),
        (empty, "has 0 bytes"),
        (Path.unlink, "No such file"),
        (rename, "No such file"),
        (older, "SHA-256"),
        (pickle, "bytes and was saved with"),
        (folder, "not a regular file"),
        (link, "symbolic link"),
        (pipe, "not a regular file"),
    ],
)
def test_a_shard_that_is_not_the_saved_one(
    run: Path, damage: Callable[[Path], None], words: str
) -> None:
    damage(new(run) / SHARD)
    assert_falls_back(run, SHARD, words)


@pytest.mark.parametrize("damage", [cut, lengthen, empty, Path.unlink, pickle, folder, link, pipe])
def test_a_manifest_that_is_not_the_saved_one(run: Path, damage: Callable[[Path], None]) -> None:
    damage(new(run) / "manifest.json")
    assert_falls_back(run)


def test_a_manifest_of_another_step(run: Path) -> None:
    older(new(run) / "manifest.json")
    assert_falls_back(run, "holds step 10")


def test_a_huge_manifest_is_not_read(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.truncate(new(run) / "manifest.json", manifest.LONGEST_BYTES + 1)
    monkeypatch.setattr(manifest, "LONGEST_BYTES", 5000)
    assert_falls_back(run, "more than 5000 bytes")


def test_a_folder_that_is_a_link_a_file_or_empty(run: Path) -> None:
    outside = run.parent / "outside"
    new(run).rename(outside)
    new(run).symlink_to(outside)
    assert_falls_back(run, "symbolic link")
    new(run).unlink()
    new(run).write_text("text")
    assert_falls_back(run, "not a folder")
    new(run).unlink()
    new(run).mkdir()
    assert_falls_back(run, "has no manifest")


def test_a_folder_that_was_renamed(run: Path) -> None:
    new(run).rename(run / "step_00000021")
    loaded = load(run, alone())
    assert loaded.step == 10
    assert loaded.skipped == ("step_00000021 holds step 20, so the folder was renamed",)


# --- forged: all hashes right, the content a lie -------------------------------------------------


def forge(step_folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a manifest and give it the hash that it then has."""
    path = step_folder / "manifest.json"
    content = json.loads(path.read_text())
    del content["sha256"]
    change(content)
    content["sha256"] = manifest._digest(content)
    path.write_text(manifest._canonical(content))


def shard(content: dict[str, Any]) -> dict[str, Any]:
    found = content["shards"][SHARD]
    assert isinstance(found, dict)
    return found


FORGERIES: dict[str, Callable[[dict[str, Any]], object]] = {
    "no step": lambda c: c.pop("step"),
    "step is text": lambda c: c.update(step="20"),
    "step is true": lambda c: c.update(step=True),
    "negative step": lambda c: c.update(step=-20),
    "huge step": lambda c: c.update(step=10**30),
    "format is text": lambda c: c.update(format="1"),
    "format 0": lambda c: c.update(format=0),
    "layout is a number": lambda c: c.update(layout=3),
    "layout is no layout": lambda c: c.update(layout="xp3"),
    "absurd layout": lambda c: c.update(layout="dp1.pp999999.tp999999"),
    "meta is a list": lambda c: c.update(meta=[]),
    "shards is a list": lambda c: c.update(shards=[SHARD]),
    "shards is a number": lambda c: c.update(shards=3),
    "shard is null": lambda c: c["shards"].update({SHARD: None}),
    "no shards": lambda c: c.update(shards={}),
    "shard above": lambda c: c["shards"].update({"../x.safetensors": shard(c)}),
    "only a shard above": lambda c: c.update(shards={f"../step_00000010/{SHARD}": shard(c)}),
    "absolute shard": lambda c: c.update(shards={f"/etc/{SHARD}": shard(c)}),
    "shard of another rank": lambda c: c["shards"].update(
        {manifest.shard_name({"pipeline": 0, "tensor": 1}, parse_layout("dp1.tp2")): shard(c)}
    ),
    "size is a fraction": lambda c: shard(c).update(bytes=1.5),
    "huge size": lambda c: shard(c).update(bytes=1 << 80),
    "large size": lambda c: shard(c).update(bytes=1 << 50),
    "negative size": lambda c: shard(c).update(bytes=-1),
    "no block size": lambda c: shard(c).update(block_bytes=0),
    "block of the whole memory": lambda c: shard(c).update(block_bytes=1 << 50),
    "a block too few": lambda c: shard(c)["sha256"].pop(),
    "a block too many": lambda c: shard(c)["sha256"].append("00"),
    "blocks are numbers": lambda c: shard(c).update(sha256=[1, 2, 3]),
    "blocks are text": lambda c: shard(c).update(sha256="abc"),
    "blocks of another file": lambda c: shard(c)["sha256"].reverse(),
}


@pytest.mark.parametrize("change", FORGERIES.values(), ids=FORGERIES)
def test_a_forged_manifest(run: Path, change: Callable[[dict[str, Any]], object]) -> None:
    forge(new(run), change)
    assert_falls_back(run)


@pytest.mark.parametrize(
    "text", ["", "[]", "null", '{"a": 1, "a": 2}', "[" * 100_000, "{" + "1" * 9999]
)
def test_a_manifest_that_is_no_object(run: Path, text: str) -> None:
    (new(run) / "manifest.json").write_text(text)
    assert_falls_back(run, "manifest")


def test_a_name_that_stands_twice_in_a_manifest(run: Path) -> None:
    path = new(run) / "manifest.json"
    path.write_text(path.read_text().replace('"step": 20', '"step": 20,\n "step": 20', 1))
    assert_falls_back(run, "a name stands twice")


def test_a_newer_format_is_not_passed_over(run: Path) -> None:
    forge(new(run), lambda content: content.update(format=2, mpmp="9.0", shards="in the cloud"))
    with pytest.raises(
        CheckpointError, match=r"step_00000020 was saved by mpmp '9\.0' in format 2"
    ):
        load(run, alone())
    save(run, 30, {}, {}, alone(), keep=1)
    assert new(run).exists(), "pruning removed what a newer mpmp had saved"


@pytest.mark.parametrize("lie", [0, 1 << 20, 1 << 62])
def test_a_forged_header_with_the_right_hashes(run: Path, lie: int) -> None:
    data = (new(run) / SHARD).read_bytes()[:5000]
    with open(new(run) / SHARD, "wb") as file:
        writer = BlockWriter(file)
        writer.write(lie.to_bytes(8, "little") + data[8:])
        said = manifest.describe(writer.finish())
    forge(new(run), lambda content: content["shards"].update({SHARD: said}))
    assert_falls_back(run, f"says its header has {lie} bytes")
