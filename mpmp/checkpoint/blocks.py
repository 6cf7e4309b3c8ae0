"""Files hashed block by block: on the way out while they are written, on the way in before use.

    file    | block 0 | block 1 | block 2 | last |
    SHA-256     h0        h1        h2       h3      kept in the manifest

A reader can verify the part it needs without the rest, and no byte of a damaged block is used.
Hashing, copying to the kernel and the disk's own work go side by side:

    thread   copy 0 | copy 1 | copy 2 | fsync
    others   hash 0, 1 | hash 2, 3 | ..
    disk              write 0 | write 1 | write 2      asked to begin, not waited for before fsync
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import stat
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray

from mpmp.checkpoint.hashing import Block, has_pairs, hash_blocks
from mpmp.checkpoint.points import point
from mpmp.errors import CheckpointError

BLOCK_BYTES = 1 << 20
_WRITE_BYTES = 16 << 20
"""Longest single write: hashing gets its turns on one core, and the disk soon has work."""
_SYNC_FILE_RANGE_WRITE = 2


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
    threads = torch.get_num_threads()  # one core alone hashes no faster than a disk writes ..
    if threads > 1 and has_pairs():
        threads -= 1  # .. but by pairs it does, and then this thread wants a core to keep it busy
    with ThreadPoolExecutor(threads, "hash") as beside:
        hashed = beside.map(hash_blocks, _pairs(_blocks(parts, BLOCK_BYTES)))
        with open(path, "xb") as file:
            written = begun = 0
            for part in parts:
                for start in range(0, len(part), _WRITE_BYTES):
                    written += file.write(part[start : start + _WRITE_BYTES])
                    if written - begun >= _WRITE_BYTES:
                        # Whole blocks: what is added to a page may have to wait for its writing.
                        whole = (written - begun) // BLOCK_BYTES * BLOCK_BYTES
                        begin_writing(file.fileno(), begun, whole)
                        begun += whole
                    point("in a shard")
            file.flush()
            point("shard written")
            os.fsync(file.fileno())
        blocks = tuple(chain.from_iterable(hashed))
        return Fingerprint(written, BLOCK_BYTES, blocks)


def begin_writing(descriptor: int, start: int, size: int) -> None:
    """Have the disk begin with bytes that were written to a file, without waiting for its end.

    This is advice: what is on the disk, and whether all went well, fsync says afterwards. Unlike
    fdatasync it commits no journal.
    """
    if (ask := _sync_file_range()) is not None:
        ask(descriptor, start, size, _SYNC_FILE_RANGE_WRITE)


@cache
def _sync_file_range() -> Any:
    """Linux's call, which Python does not offer; None where the C library has none."""
    found = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if found is not None:
        found.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    return found


def _blocks(parts: Sequence[memoryview], block_bytes: int) -> Iterator[Block]:
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


def _pairs(blocks: Iterator[Block]) -> Iterator[Sequence[Block]]:
    """Two by two, and the last one alone where their number is odd."""
    while pair := list(islice(blocks, 2)):
        yield pair


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
