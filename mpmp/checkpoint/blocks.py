"""Files hashed block by block: on the way out while written, on the way in before use.

    file    | block 0 | block 1 | block 2 | last |
    SHA-256     h0        h1        h2       h3      kept in the manifest

A reader can verify the part it needs without the rest, and no byte of a damaged block gets out.
"""

from __future__ import annotations

import hashlib
import os
import stat
from dataclasses import dataclass
from typing import BinaryIO

from mpmp.errors import CheckpointError

BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class Fingerprint:
    """Length of a file and the SHA-256 (hex) of each of its blocks."""

    size_bytes: int
    block_bytes: int
    blocks: tuple[str, ...]


class BlockWriter:
    """Passes bytes on to a file and hashes them."""

    def __init__(self, file: BinaryIO, block_bytes: int = BLOCK_BYTES) -> None:
        self._file, self._block_bytes = file, block_bytes
        self._size, self._blocks, self._hash = 0, list[str](), hashlib.sha256()

    def write(self, data: bytes | memoryview) -> None:
        start, end = 0, len(data)
        while start < end:
            room = self._block_bytes - self._size % self._block_bytes
            part = data[start : start + room]
            self._hash.update(part)
            self._file.write(part)
            self._size += len(part)
            start += len(part)
            if self._size % self._block_bytes == 0:
                self._close_block()

    def finish(self) -> Fingerprint:
        """The file's fingerprint, once all of it is on the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        if self._size % self._block_bytes:
            self._close_block()
        return Fingerprint(self._size, self._block_bytes, tuple(self._blocks))

    def _close_block(self) -> None:
        self._blocks.append(self._hash.hexdigest())
        self._hash = hashlib.sha256()


class BlockReader:
    """Hands out the bytes of a file in order, each block once it was verified."""

    def __init__(self, file: BinaryIO, expected: Fingerprint) -> None:
        self._file, self._expected = file, expected
        self._block, self._number = memoryview(b""), 0

    def fill(self, target: memoryview) -> None:
        """The next ``len(target)`` bytes; raises CheckpointError where they are damaged."""
        start = 0
        while start < len(target):
            if not self._block:
                self._next_block()
            part = self._block[: len(target) - start]
            target[start : start + len(part)] = part
            self._block = self._block[len(part) :]
            start += len(part)

    def _next_block(self) -> None:
        expected, number = self._expected, self._number
        if number == len(expected.blocks):
            raise CheckpointError(f"has no bytes after {expected.size_bytes}")
        offset = number * expected.block_bytes
        block = self._file.read(min(expected.block_bytes, expected.size_bytes - offset))
        if hashlib.sha256(block).hexdigest() != expected.blocks[number]:
            raise CheckpointError(
                f"is damaged in block {number} of {len(expected.blocks)} "
                f"(bytes {offset} to {offset + len(block)}): its SHA-256 is not the one saved"
            )
        self._block, self._number = memoryview(block), number + 1


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
