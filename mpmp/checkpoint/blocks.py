"""Files hashed block by block: on the way out while they are written, on the way in before use.

    file    | block 0 | block 1 | block 2 | last |
    SHA-256     h0        h1        h2       h3      kept in the manifest

A reader can verify the part it needs without the rest, and no byte of a damaged block is used.
Hashing and writing both leave the interpreter to other threads, so they go side by side.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray

from mpmp.checkpoint.points import point
from mpmp.errors import CheckpointError

BLOCK_BYTES = 1 << 20
_WRITE_BYTES = 16 << 20
"""Longest single write, so that hashing gets its turns on one core."""


@dataclass(frozen=True)
class Fingerprint:
    """Length of a file and the SHA-256 (hex) of each of its blocks; no hashes if none are known."""

    size_bytes: int
    block_bytes: int
    blocks: tuple[str, ...]

    @property
    def num_blocks(self) -> int:
        return -(-self.size_bytes // self.block_bytes)

    def bounds(self, number: int) -> tuple[int, int]:
        """Where a block begins and ends in the file."""
        start = number * self.block_bytes
        return start, min(start + self.block_bytes, self.size_bytes)


# --- writing ------------------------------------------------------------------------------------


def write_file(path: Path, parts: Sequence[memoryview]) -> Fingerprint:
    """Make a new file of some bytes, one part after the other, and have it on the disk."""
    # As many threads as this rank computes with: one core hashes no faster than a disk writes.
    with ThreadPoolExecutor(torch.get_num_threads(), "hash") as beside:
        hashed = beside.map(_hash, _blocks(parts, BLOCK_BYTES))
        with open(path, "xb") as file:
            for part in parts:
                for start in range(0, len(part), _WRITE_BYTES):
                    file.write(part[start : start + _WRITE_BYTES])
                    point("in a shard")
            file.flush()
            point("shard written")
            os.fsync(file.fileno())
        return Fingerprint(sum(map(len, parts)), BLOCK_BYTES, tuple(hashed))


def _blocks(parts: Sequence[memoryview], block_bytes: int) -> Iterator[list[memoryview]]:
    """The bytes of each block, in as many pieces as parts it lies in."""
    block: list[memoryview] = []
    room = block_bytes
    for part in parts:
        start = 0
        while start < len(part):
            piece = part[start : start + room]
            block.append(piece)
            start, room = start + len(piece), room - len(piece)
            if room == 0:
                yield block
                block, room = [], block_bytes
    if block:
        yield block


def _hash(pieces: list[memoryview]) -> str:
    sha = hashlib.sha256()
    for piece in pieces:
        sha.update(piece)
    return sha.hexdigest()


# --- reading ------------------------------------------------------------------------------------


def open_plain(path: str, folder: int | None = None) -> BinaryIO:
    """A regular file for reading; raises CheckpointError for a link, a pipe or a device.

    ``folder`` is a descriptor of the folder that a relative path lies in.
    """
    # A link could lead out of the run's folder; without NONBLOCK a pipe would never open.
    if stat.S_ISLNK(os.stat(path, dir_fd=folder, follow_symlinks=False).st_mode):
        raise CheckpointError("is a symbolic link")
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = os.open(path, flags, dir_fd=folder)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CheckpointError("is not a regular file")
    return open(descriptor, "rb")


def open_saved(path: Path, expected: Fingerprint) -> BinaryIO:
    """A file that is as long as it was; CheckpointError where it is not, or is no plain file."""
    # The folder by descriptor: not even a link put in its place meanwhile is followed.
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        file = open_plain(path.name, folder)
    finally:
        os.close(folder)
    size = os.fstat(file.fileno()).st_size
    if size != expected.size_bytes:
        file.close()
        raise CheckpointError(f"has {size} bytes and was saved with {expected.size_bytes}")
    return file


def read_block(file: BinaryIO, expected: Fingerprint, number: int) -> NDArray[Any]:
    """The bytes of a block; CheckpointError where they are not those that were saved."""
    start, stop = expected.bounds(number)
    block: NDArray[Any] = np.empty(stop - start, dtype=np.uint8)
    room = block.data
    while room:
        taken = os.preadv(file.fileno(), [room], stop - len(room))
        if taken == 0:
            raise CheckpointError(f"has no bytes after {stop - len(room)}")
        room = room[taken:]
    if expected.blocks and hashlib.sha256(block.data).hexdigest() != expected.blocks[number]:
        raise CheckpointError(
            f"is damaged in block {number} of {len(expected.blocks)} "
            f"(bytes {start} to {stop}): its SHA-256 is not the one saved"
        )
    return block


def verify(path: Path, expected: Fingerprint) -> None:
    """See that a file is as it was saved; CheckpointError names the first block that is not."""
    with open_saved(path, expected) as file:
        for number in range(expected.num_blocks):
            read_block(file, expected, number)
