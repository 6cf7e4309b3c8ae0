"""Damaged, foreign and forged checkpoints: none is loaded, the step before it is, and both told."""

from __future__ import annotations

import json
import os
import resource
import shutil
from pathlib import Path

import pytest
import torch

from mpmp.checkpoint import ALONE, Found, Held, Loaded, load, manifest, save, tensor_files
from mpmp.checkpoint.extents import Extent
from mpmp.checkpoint.folder import read_manifest
from mpmp.checkpoint.resharding import cut_anew
from mpmp.checkpoint.sharing import Holding
from mpmp.errors import CheckpointError
from mpmp.programs.partition import partition
from system.damages import FILES, FOLDERS, Work, flip, places, shards, snapshot
from system.forgeries import FORGED, forge

SHAPES = {"weight/a": (40, 12), "exp_avg/a": (40, 12), "weight/b": (6,), "weight/empty": (0, 3)}
RANKS = 3


def content(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {key: torch.randn(shape, generator=generator) for key, shape in SHAPES.items()}


def holdings(rank: int, ranks: int = RANKS) -> list[Holding]:
    """An even share of the elements of each tensor."""
    found = []
    for key, one in content(0).items():
        start, stop = partition(one.numel(), ranks)[rank]
        box = tuple((0, length) for length in one.shape)
        found.append(Holding(key, one.dtype, tuple(one.shape), Extent(box, start, stop)))
    return found


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with steps 10 and 20, each of three files and the manifest."""
    top = tmp_path_factory.mktemp("made")
    (top / "run").mkdir()
    every = [holdings(rank) for rank in range(RANKS)]
    for step in (10, 20):
        held = [Held.whole(key, one) for key, one in content(step).items()]
        path = save(top / "whole", step, held, {"step": step}, ALONE, keep=1)
        cut_anew(path, read_manifest(path)[1], every, top / "run", "dp3")
    return top / "run"


@pytest.fixture
def run(tmp_path: Path, made: Path) -> Path:
    """A copy of it, whose second step is what tests damage."""
    return Path(shutil.copytree(made, tmp_path / "run"))


def new(run: Path) -> Path:
    return run / "step_00000020"


def loaded(run: Path) -> tuple[Loaded, dict[str, torch.Tensor]]:
    """The newest good checkpoint, and its tensors."""
    found: dict[str, torch.Tensor] = {}

    def wants(said: Found) -> list[Held]:
        there = said.contents.tensors
        found.update({key: torch.empty(one.shape, dtype=one.dtype) for key, one in there.items()})
        return [Held.whole(key, one) for key, one in found.items()]

    return load(run, wants, ALONE), found


def assert_loads(run: Path, step: int) -> tuple[str, ...]:
    """A step comes back bit for bit; a sentence for each other one."""
    found, tensors = loaded(run)
    assert found.step == found.meta["step"] == step
    assert {key: one.tolist() for key, one in tensors.items()} == {
        key: one.tolist() for key, one in content(step).items()
    }
    return found.skipped


def assert_falls_back(run: Path, *words: str) -> None:
    """Step 10 is loaded and one sentence says why step 20 was not."""
    (sentence,) = assert_loads(run, 10)
    missing = [word for word in ("step_0000002", *words) if word not in sentence]
    assert not missing and len(sentence) < 400, sentence


# --- flipped bits ---------------------------------------------------------------------------------


def test_one_flipped_bit_at_1000_places_of_all_files_is_found(run: Path) -> None:
    aside = run.parent / "aside"
    (run / "step_00000010").rename(aside)
    found = 0
    for path, bit in places(new(run), 1000, seed=1):
        flip(path, bit)
        said = "manifest" if path.name == "manifest.json" else f"{path.name} is damaged in block 0"
        with pytest.raises(CheckpointError, match=f"step_00000020.*{said}"):
            loaded(run)
        found += 1
        flip(path, bit)
    assert found == 1000 and assert_loads(run, 20) == ()
    flip(shards(new(run))[2], 5555)
    aside.rename(run / "step_00000010")
    assert_falls_back(run, "shard_00002.safetensors")


def test_one_flipped_bit_anywhere_in_a_manifest_is_found(run: Path) -> None:
    path = new(run) / "manifest.json"
    text = bytearray(path.read_bytes())
    for bit in range(8 * len(text)):
        text[bit // 8] ^= 1 << bit % 8
        try:
            manifest.parse(text.decode("ascii"))
        except (CheckpointError, UnicodeDecodeError):
            pass
        else:
            pytest.fail(f"bit {bit} of the manifest can be turned over")
        text[bit // 8] ^= 1 << bit % 8
    assert manifest.parse(text.decode("ascii")).step == 20


def test_the_block_that_is_damaged_is_named(tmp_path: Path) -> None:
    """Of a file of three blocks."""
    big = torch.arange(300_001, dtype=torch.float64)
    path = save(tmp_path, 1, [Held.whole("weight/big", big)], {}, ALONE, keep=1)
    file = shards(path)[0]
    for block, byte in enumerate((0, 1 << 20, file.stat().st_size - 1)):
        flip(file, 8 * byte)
        with pytest.raises(CheckpointError, match=f"damaged in block {block} of 3"):
            loaded(tmp_path)
        flip(file, 8 * byte)
    assert loaded(tmp_path)[0].step == 1


# --- everything else ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*FILES, *FOLDERS, *FORGED])
def test_damage_is_told_and_passed_over(run: Path, name: str) -> None:
    work, words = {**FILES, **FOLDERS, **FORGED}[name]
    assert_damage(run, work, words)


def assert_damage(run: Path, work: Work, words: str) -> None:
    """The step before is loaded; alone, the damaged one is code 78; neither changes anything."""
    work(new(run))
    before = snapshot(run.parent)
    assert_falls_back(run, words)
    assert snapshot(run.parent) == before
    shutil.rmtree(run / "step_00000010")
    with pytest.raises(CheckpointError, match="no good checkpoint") as caught:
        loaded(run)
    assert caught.value.exit_code == 78 and words in str(caught.value)


def test_a_step_may_have_more_files_than_a_process_may_open(run: Path) -> None:
    many = run.parent / "many"
    many.mkdir()
    every = [holdings(rank, 40) for rank in range(40)]
    cut_anew(new(run), read_manifest(new(run))[1], every, many, "dp40")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + 20, limits[1]))
    try:
        assert assert_loads(many, 20) == ()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        os.close(lowest)


def test_with_no_good_step_each_is_named_with_its_reason(run: Path) -> None:
    flip(shards(new(run))[0], 77)
    shards(run / "step_00000010")[1].unlink()
    with pytest.raises(CheckpointError, match="no good checkpoint") as caught:
        loaded(run)
    for words in ("step_00000020", "block 0 of 1", "step_00000010", "No such file"):
        assert words in str(caught.value)


def test_a_manifest_of_any_depth_is_refused_in_a_sentence() -> None:
    """Reading gives up at another depth than writing does, with which it is compared."""
    for depth in range(850, 1010):
        with pytest.raises(CheckpointError):
            manifest.parse('{"a": ' + "[" * depth + "]" * depth + "}\n")


def test_a_file_that_is_a_link_to_itself_is_told(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.symlink_to(path)
    with pytest.raises(CheckpointError, match="model.safetensors is a symbolic link to itself"):
        tensor_files([path], ALONE)


def test_a_huge_manifest_is_not_read(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.truncate(new(run) / "manifest.json", manifest.LONGEST_BYTES + 1)
    monkeypatch.setattr(manifest, "LONGEST_BYTES", 5000)
    assert_falls_back(run, "more than 5000 bytes")


def test_a_newer_format_is_not_passed_over(run: Path) -> None:
    forge(lambda content: content.update(format=3, mpmp="9.0", files="in the cloud"), new(run))
    with pytest.raises(
        CheckpointError, match=r"step_00000020 was saved by mpmp '9\.0' in format 3"
    ):
        loaded(run)
    save(run, 30, [], {}, ALONE, keep=1)
    assert new(run).exists(), "pruning removed what a newer mpmp had saved"


# --- headers of files of other programs -----------------------------------------------------------


def header(text: str, data: bytes = b"") -> bytes:
    return len(text).to_bytes(8, "little") + text.encode() + data


def one(name: str = "a", dtype: object = "F32", shape: object = (2,), at: object = (0, 8)) -> str:
    """A header's entry."""
    return json.dumps({name: {"dtype": dtype, "shape": shape, "data_offsets": at}})[1:-1]


def file_of(*entries: str, size: int = 8) -> bytes:
    return header("{" + ", ".join(entries) + "}", bytes(size))


HEADERS = {
    "nothing": b"",
    "a length alone": bytes(8),
    "length 0": bytes(16),
    "length beyond the file": (1 << 20).to_bytes(8, "little") + b"{}",
    "length 2^62": (1 << 62).to_bytes(8, "little") + b"{}",
    "length 2^64 - 1": b"\xff" * 8 + b"{}",
    "not JSON": header("{]"),
    "not UTF-8": (2).to_bytes(8, "little") + b"\xff\xfe",
    "a list": header("[]"),
    "100 000 brackets": header("[" * 100_000),
    "a number of 9999 digits": header('{"a": ' + "1" * 9999 + "}"),
    "an entry that is null": header('{"a": null}'),
    "a name twice": file_of(one(), one()),
    "data that overlap": file_of(one(), one("b")),
    "data with a gap": file_of(one(at=(8, 16)), size=16),
    "data behind the end": file_of(one(), size=0),
    "data that nothing describes": file_of(one(), size=16),
    "an unknown dtype": file_of(one(dtype="F7")),
    "a dtype that is a list": file_of(one(dtype=[])),
    "a shape that is text": file_of(one(shape="2")),
    "a negative shape": file_of(one(shape=(-1, -2))),
    "a shape of fractions": file_of(one(shape=(2.0,))),
    "a shape of 2^80 elements": file_of(one(shape=(1 << 40, 1 << 40))),
    "a shape of 0 and 2^62": file_of(one(shape=(0, 1 << 62), at=(0, 0)), size=0),
    "a shape that is 2 in 64 bits": file_of(one(shape=(2, (1 << 64) + 1))),
    "offsets the wrong way": file_of(one(at=(8, 0))),
    "negative offsets": file_of(one(at=(-8, 0))),
    "three offsets": file_of(one(at=(0, 4, 8))),
    "a pickle": b"\x80\x02}q\x00." * 20,
    "a zip": b"PK\x03\x04" + bytes(100),
}


@pytest.mark.parametrize("name", HEADERS)
def test_absurd_headers_are_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(HEADERS[name])
    with pytest.raises(CheckpointError) as caught:
        tensor_files([path], ALONE)
    assert "model.safetensors" in str(caught.value) and len(str(caught.value)) < 400
