"""Blocks hashed two at once against hashlib, and a file that is on its way while it is written."""

from __future__ import annotations

import ctypes
import hashlib
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from mpmp_kernels import build

from mpmp.checkpoint import blocks, hashing
from mpmp.checkpoint.hashing import hash_blocks

LENGTHS = [*range(1, 130), 1000, 4095, 1 << 20]


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    """What is known of this machine is found out anew after each test."""
    yield
    build.library.cache_clear()
    build.library_or_none.cache_clear()
    hashing.has_pairs.cache_clear()


def data(size: int, seed: int = 0) -> memoryview:
    return memoryview(random.Random(seed).randbytes(size))


def right(*found: memoryview) -> list[str]:
    return [hashlib.sha256(one).hexdigest() for one in found]


@pytest.mark.parametrize("shift", [0, 1, 13])
def test_two_blocks_of_any_length_and_place(shift: int) -> None:
    for size in LENGTHS:
        first, second = data(size + shift)[shift:], data(size + shift, seed=1)[shift:]
        assert hash_blocks([[first], [second]]) == right(first, second), size


def test_the_kernel_itself_where_the_processor_has_the_instructions() -> None:
    """So that a silent way round it is noticed, and no byte beyond the digests is written."""
    flags = Path("/proc/cpuinfo").read_text()
    first, second = data(777), data(777, seed=1)
    places = [np.frombuffer(one, dtype=np.uint8).ctypes.data for one in (first, second)]
    found = ctypes.create_string_buffer(b"\xaa" * 80, 80)
    done = build.library().mpmp_sha256_pair(777, *places, found)
    assert done == hashing.has_pairs() == (" sha_ni" in flags)
    digests = b"".join(hashlib.sha256(one).digest() for one in (first, second))
    assert found.raw == (digests if done else b"\xaa" * 64) + b"\xaa" * 16


@pytest.mark.parametrize("has_kernels", [True, False])
def test_one_block_or_several_pieces_or_no_compiler(
    monkeypatch: pytest.MonkeyPatch, has_kernels: bool
) -> None:
    if not has_kernels:
        monkeypatch.setenv("CC", "/nowhere/cc")
    build.library.cache_clear()
    build.library_or_none.cache_clear()
    hashing.has_pairs.cache_clear()
    a, b, c = data(300), data(300, seed=1), data(299, seed=2)
    assert hash_blocks([[a]]) == right(a)
    assert hash_blocks([[a], [b]]) == right(a, b)
    assert hash_blocks([[a], [c]]) == right(a, c)
    assert hash_blocks([[a[:17], a[17:]], [b]]) == right(a, b)
    assert hash_blocks([[], []]) == right(a[:0], a[:0])
    assert has_kernels or not hashing.has_pairs()


@pytest.mark.parametrize("sizes", [[], [1], [100, 5 << 20, 7, 1 << 20, 1, (2 << 20) - 9]])
def test_a_file_of_parts_and_its_fingerprint(tmp_path: Path, sizes: list[int]) -> None:
    parts = [data(size, seed) for seed, size in enumerate(sizes)]
    whole = b"".join(parts)
    found = blocks.write_file(tmp_path / "file", parts)
    assert (tmp_path / "file").read_bytes() == whole
    cuts = range(0, len(whole), blocks.BLOCK_BYTES)
    each = [memoryview(whole)[at : at + blocks.BLOCK_BYTES] for at in cuts]
    assert (found.size_bytes, list(found.blocks)) == (len(whole), right(*each))


def test_the_disk_is_asked_early_for_blocks_that_follow_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(blocks, "_WRITE_BYTES", 2 << 20)
    monkeypatch.setattr(
        blocks, "begin_writing", lambda _, start, size: asked.append((start, start + size))
    )
    block = blocks.BLOCK_BYTES
    parts = [data(100), data(7 * block), data(3 * block + 5)]
    size = blocks.write_file(tmp_path / "file", parts).size_bytes
    assert asked[0] == (0, 2 * block) and all(stop % block == 0 for _, stop in asked)
    assert [stop for _, stop in asked[:-1]] == [start for start, _ in asked[1:]]
    assert 0 < size - asked[-1][1] < 2 * block, "fsync is left with less than two writes"


def test_where_the_disk_cannot_be_asked_files_are_as_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = data(40 << 20)
    with_it = blocks.write_file(tmp_path / "with", [part])
    assert blocks._sync_file_range() is not None, "Linux's C libraries have the call"
    monkeypatch.setattr(blocks, "_sync_file_range", lambda: None)
    assert blocks.write_file(tmp_path / "without", [part]) == with_it
    assert (tmp_path / "with").read_bytes() == (tmp_path / "without").read_bytes() == part


def test_a_digest_that_differs_in_a_bit_is_seen() -> None:
    """The two digests are those of their blocks, in their order, and not of each other."""
    a, b = data(1 << 12), data(1 << 12, seed=1)
    assert hashing.hash_blocks([[b], [a]]) == hashing.hash_blocks([[a], [b]])[::-1] == right(b, a)
