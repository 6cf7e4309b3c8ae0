"""Lanes: where the ranks of a host meet.

A lane is one line of shared memory a rank. On it the rank says how often it has published, and, in
a header, where its buffer lies and what it is about to do; all compare the headers when they meet,
on every call, so that ranks which differ raise together and never add what does not belong
together.

What a rank has shown it may still be read after it has gone on, so headers and slots are two, taken
in turns: headers by operations, for the next but one is met only by those who have ended this one;
slots by publications, for an operation may pass many pieces.
"""

from __future__ import annotations

import ctypes
import json
import warnings
from collections.abc import Sequence
from functools import cache

import torch
from mpmp_kernels import build
from mpmp_kernels.build import LINE_BYTES
from torch import Tensor

from mpmp.comm.mpi import MPI
from mpmp.comm.share import PAGE_BYTES, Shares
from mpmp.comm.world import World

CACHE_LINE_BYTES = 64
assert LINE_BYTES <= PAGE_BYTES

KERNELS = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float64: 2,
    torch.float16: 3,
    torch.int64: 4,
    torch.int32: 5,
}
"""Dtypes whose sums window.c knows."""


@cache
def kernels() -> ctypes.CDLL | None:
    """The compiled kernels; without a compiler None, and one warning."""
    try:
        return build.library()
    except build.BuildError as error:
        warnings.warn(
            "sums in shared memory and parts of layers run in plain torch, several times slower, "
            f"because {error}; install a C compiler",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


class Lane:
    """Lines and slots of a group whose ranks share a host; calls on it follow one another."""

    def __init__(
        self,
        shares: Shares,
        ranks: Sequence[int],
        own: int,
        memory: Tensor,
        places: list[list[int]],
    ) -> None:
        self.size, self._memory = len(ranks), memory
        bases = [shares.base[rank] for rank in ranks]
        self.shares = (ctypes.c_uint64 * self.size)(*bases)
        self.lines = (ctypes.c_uint64 * self.size)(
            *(base + line for base, (line, _) in zip(bases, places, strict=True))
        )
        self.slot_bytes = places[own][1]
        line = shares.offset(memory)
        self.slots = [line + PAGE_BYTES + turn * self.slot_bytes for turn in (0, 1)]
        """Offsets of the two slots in this rank's share."""
        self.struct = build.Lane(
            self.size, own, ctypes.addressof(self.shares), ctypes.addressof(self.lines), 0, 0
        )

    @classmethod
    def open(
        cls, world: World, shares: Shares, comm: MPI.Intracomm, ranks: Sequence[int], slot: int
    ) -> Lane | None:
        """A lane with two slots of ``slot`` bytes, or None, on all ranks alike, without room."""
        slot = -(-slot // CACHE_LINE_BYTES) * CACHE_LINE_BYTES  # so that both begin on one
        memory = shares.empty(PAGE_BYTES + 2 * slot)
        if memory is not None:
            memory[:PAGE_BYTES].zero_()
        place = [-1, 0] if memory is None else [shares.offset(memory), slot]
        places = [json.loads(text) for text in world.gather_texts(json.dumps(place), comm)]
        if any(line < 0 for line, _ in places):
            return None
        assert memory is not None
        return cls(shares, ranks, comm.rank, memory, places)

    def next_slot(self) -> int:
        """Offset, in this rank's share, of the slot whose turn it is before an operation."""
        published: int = self.struct.base
        return self.slots[published & 1]
