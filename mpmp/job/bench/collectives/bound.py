"""What memory allows: the window allreduce's access pattern on private memory, all ranks at once.

    every rank:  read its 1/p of p arrays, add, write it to the same p arrays, in place

n bytes read and n written on every rank, as in the allreduce, without waiting for one another and
without memory that is shared: no allreduce of this kind can be faster.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from mpmp.comm.lane import KERNELS, kernels
from mpmp.job.bench.collectives.contenders import Task
from mpmp.programs.partition import partition


@dataclass(frozen=True)
class Bound:
    """The fastest that memory lets ``ranks`` ranks sum and publish ``nbytes``."""

    nbytes: int
    ranks: int
    seconds: float

    @property
    def moved_per_rank(self) -> int:
        return 2 * self.nbytes

    @property
    def bandwidth(self) -> float:
        """GB/s of all ranks, reads and writes."""
        return self.moved_per_rank * self.ranks / self.seconds / 1e9

    def __str__(self) -> str:
        once = self.nbytes / (1 << 20)
        return (
            f"bound at {once:g} MiB: every rank reads {once:g} MiB and writes {once:g} MiB of "
            f"private memory, all at once\n"
            f"{2 * once:g} MiB moved a rank, {2 * once * self.ranks:g} MiB in all, in "
            f"{self.seconds * 1e6:,.0f} us: {self.bandwidth:.1f} GB/s"
        )

    def share(self, seconds: float) -> float:
        """How near an allreduce of the same length that takes so long comes to the bound."""
        return self.seconds / seconds


def bound_calls(task: Task) -> list[Callable[[], object]]:
    """Passes of the kernel over private arrays as long as this rank's piece of the task.

    The kernel can store past the cache or not; the faster way is the bound. Empty where this
    machine has no kernel.
    """
    library, size = kernels(), task.group.size
    if library is None or task.dtype not in KERNELS:
        return []
    start, stop = partition(task.length, size)[task.group.rank]
    arrays = [torch.zeros(stop - start, dtype=task.dtype) for _ in range(size)]
    pointers = (ctypes.c_void_p * size)(*(one.data_ptr() for one in arrays))

    def call(near: int) -> object:
        assert arrays  # which the pointers lead to
        return library.mpmp_sum_publish(
            KERNELS[task.dtype], stop - start, size, pointers, size, pointers, 1.0, near
        )

    return [partial(call, near) for near in (-1, task.group.rank)]
