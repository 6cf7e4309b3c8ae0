"""SHA-256 of blocks: two at once where this machine can, or one after the other by hashlib.

Two are hashed in the time of one (``kernels/mpmp_kernels/sha256.c``), and both ways leave the
interpreter to other threads.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Sequence
from functools import cache

import numpy as np
from mpmp_kernels import build

Block = Sequence[memoryview]
"""Bytes in one piece or several."""
_DIGEST_BYTES = 32


def hash_blocks(blocks: Sequence[Block]) -> list[str]:
    """The SHA-256 (hex) of each of one or two blocks."""
    if len(blocks) == 2 and all(len(one) == 1 for one in blocks):
        (first,), (second,) = blocks
        if len(first) == len(second) and has_pairs():
            return _pair(first, second)
    return [_alone(one) for one in blocks]


@cache
def has_pairs() -> bool:
    """Whether two blocks are hashed at once: there is a compiler, and such a processor."""
    library = build.library_or_none()
    if library is None:
        return False
    nothing = ctypes.create_string_buffer(2 * _DIGEST_BYTES)
    return bool(library.mpmp_sha256_pair(0, nothing, nothing, nothing))


def _pair(first: memoryview, second: memoryview) -> list[str]:
    """Of two places of one length."""
    places = [np.frombuffer(one, dtype=np.uint8).ctypes.data for one in (first, second)]
    digests = ctypes.create_string_buffer(2 * _DIGEST_BYTES)
    build.library().mpmp_sha256_pair(len(first), *places, digests)
    return [digests.raw[:_DIGEST_BYTES].hex(), digests.raw[_DIGEST_BYTES:].hex()]


def _alone(block: Block) -> str:
    sha = hashlib.sha256()
    for piece in block:
        sha.update(piece)
    return sha.hexdigest()
