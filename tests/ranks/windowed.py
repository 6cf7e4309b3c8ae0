"""What the tests of windows share: specs, placements, and what plain torch makes of all inputs."""

from __future__ import annotations

import functools
import hashlib

import torch

from mpmp.comm.reductions import REDUCTIONS
from mpmp.comm.spec import Spec
from mpmp.programs.collectives.allgather_window import ALLGATHER_WINDOW
from mpmp.programs.collectives.allreduce_one_shot import ALLREDUCE_ONE_SHOT
from mpmp.programs.collectives.allreduce_two_shot import ALLREDUCE_TWO_SHOT
from mpmp.programs.collectives.allreduce_window import ALLREDUCE_WINDOW
from mpmp.programs.collectives.broadcast_window import BROADCAST_WINDOW
from mpmp.programs.collectives.reduce_scatter_window import REDUCE_SCATTER_WINDOW
from mpmp.programs.partition import partition

PROGRAMS = {
    ("allreduce", "window"): ALLREDUCE_WINDOW,
    ("allreduce", "one_shot"): ALLREDUCE_ONE_SHOT,
    ("allreduce", "two_shot"): ALLREDUCE_TWO_SHOT,
    ("reduce_scatter", "window"): REDUCE_SCATTER_WINDOW,
    ("allgather", "window"): ALLGATHER_WINDOW,
    ("broadcast", "window"): BROADCAST_WINDOW,
}
PLACEMENTS = ("share", "ordinary", "mixed")


def spec_of(collective, name, length, size, dtype=torch.float32, op="sum", root=0):
    cuts = partition(length, PROGRAMS[collective, name].num_chunks(size))
    bounds = (0, *(stop for _, stop in cuts))
    facts = (("root", root),) if collective == "broadcast" else ()
    return Spec(collective, name, dtype, bounds, op, facts)


def placed(windows, length, dtype, placement):
    """A tensor in this rank's share, or not; ``mixed``: on every second rank."""
    if placement == "share" or (placement == "mixed" and windows.comm.rank % 2 == 0):
        found = windows.empty((length,), dtype)
        assert found is not None
        return found
    return torch.empty(length, dtype=dtype)


def values(length, rank, dtype, seed=0):
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    if dtype.is_floating_point:
        return torch.randn(length, generator=generator, dtype=torch.float64).to(dtype)
    return torch.randint(0, 100, (length,), generator=generator).to(dtype)


def in_rank_order(every, op="sum", combine=None):
    """What one rank makes of all: one after the other, 16-bit floats rounded once, at the end."""
    dtype = every[0].dtype
    wide = [one.float() if dtype in (torch.float16, torch.bfloat16) else one for one in every]
    total = functools.reduce(combine or REDUCTIONS[op].combine, wide)
    return (total / len(every) if op == "avg" else total).to(dtype)


def bits(x):
    return x.contiguous().view(-1).view(torch.uint8)


def same_bits(a, b):
    return a.dtype == b.dtype and torch.equal(bits(a), bits(b))


class Alike:
    """Called with what all ranks must have in common, bit for bit."""

    def __init__(self):
        self._digest = hashlib.sha256()

    def __call__(self, x):
        self._digest.update(bits(x).numpy().tobytes())

    def agree(self, world):
        return len(set(world.gather_texts(self._digest.hexdigest()))) == 1
