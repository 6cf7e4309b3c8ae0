"""How a group's GPU tensors travel: by windows, straight or staged; tried, measured, then kept.

| way | what happens |
|---|---|
| ipc | the ranks read and write each other's GPU memory (``device_window.py``); one host |
| straight | device pointers are handed to MPI; where a probe saw that MPI moves them |
| staged | copies to pinned host memory, messages and sums there, a copy back |

Flags and cards are not believed: windows are opened and summed in once before they are used, and
which way is fastest is measured for each power of two of bytes when it is first needed.
``MPMP_GPU_WAY`` names one of the ways in place of the measurement, for trials.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from functools import cache, partial

import torch
from torch import Tensor

from mpmp.comm.device_memory import Card, CardError, Pool
from mpmp.comm.device_window import DeviceWindows
from mpmp.comm.mpi import MPI
from mpmp.comm.progress import Progress
from mpmp.comm.reductions import REDUCTIONS
from mpmp.comm.spec import Spec
from mpmp.comm.world import World
from mpmp.errors import ConfigError, TensorError

WARMUPS, REPEATS = 3, 7
SMALLEST_BYTES, LARGEST_BYTES = 4 << 10, 64 << 20
"""Sizes outside are taken to go as these do."""

_TRIED = 5000
"""Elements of the sum that is tried: more than a block of the kernel, and no multiple of one."""


@cache
def pool_of(device: torch.device) -> Pool:
    """The one pool of a card in this process."""
    return Pool(Card(device))


def open_windows(
    world: World,
    comm: MPI.Intracomm,
    ranks: tuple[int, ...],
    name: str,
    pool: Pool | None = None,
) -> tuple[DeviceWindows | None, str]:
    """The windows of a group and how they were found, or None and why not; all ranks together."""
    windows, refusal = None, _refusal(world, comm.size)
    if not refusal:
        try:
            pool = pool or pool_of(world.device)
            windows = DeviceWindows(world, comm, ranks, name, pool)
            _sum_alone(windows)
        except Exception as error:  # Triton and CUDA raise all sorts; whatever it is, not by IPC
            refusal = _line(error)
    answers = [text.split("\n") for text in world.gather_texts(f"{world.host}\n{refusal}", comm)]
    reason = next((why for _, why in answers if why), "")
    if not reason and len({host for host, _ in answers}) > 1:
        reason = "the ranks are on several hosts"
    if reason or windows is None:
        return None, reason
    try:
        _sum_together(windows)
    except CardError as error:  # raised on all ranks
        return None, _line(error)
    return windows, "a sum in windows was tried"


def _refusal(world: World, size: int) -> str:
    if world.device.type != "cuda":
        return "no GPU"
    if size == 1:
        return "one rank alone"
    if torch.version.hip is not None:
        return "not written for AMD cards"
    return ""


def _line(error: Exception) -> str:
    first = (str(error).strip().splitlines() or [""])[0]
    return first if isinstance(error, CardError) else f"{type(error).__name__}: {first}"


def _sum_alone(windows: DeviceWindows) -> None:
    """Memory, its handle and the kernel, without any peer: nobody waits for a rank that fails."""
    mine = windows.empty((2, _TRIED), torch.float32)
    if mine is None:
        raise CardError(f"no room on {windows.card.device}")
    mine.fill_(3)
    rows = [row.data_ptr() for row in mine]
    windows.card.sum_publish(rows, rows[:1], _TRIED, torch.float32, 2.0)
    windows.card.sum_publish(rows, rows, _TRIED, torch.float32)
    windows.card.wait()
    if not bool((mine.cpu() == 6).all()):
        raise CardError("a trial sum on one card alone was wrong")


def _sum_together(windows: DeviceWindows) -> None:
    rank, size = windows.comm.rank, windows.comm.size
    spec = Spec("allreduce", "ipc", torch.float32, (0, _TRIED))
    x = windows.empty((_TRIED,), torch.float32)
    assert x is not None
    counted = torch.arange(_TRIED) % 1000
    x.copy_(counted + rank)
    windows.carry_out(spec, REDUCTIONS["sum"], x, 0, x, 0)
    good = bool((x.cpu() == counted * size + size * (size - 1) // 2).all())
    if "wrong" in windows.world.gather_texts("good" if good else "wrong", windows.comm):
        raise CardError("a trial sum in windows was wrong")


# --- which way ------------------------------------------------------------------------------------


class DeviceWays:
    """The ways of one group, opened at its first GPU tensor, and which one is taken.

    ``by_messages(way, x)`` sums a float32 tensor of the GPU in place over all ranks, "straight" or
    "staged". All ranks ask for the same things in the same order.
    """

    def __init__(
        self,
        world: World,
        comm: MPI.Intracomm,
        started: MPI.Intracomm,
        ranks: tuple[int, ...],
        name: str,
        progress: Progress,
        by_messages: Callable[[str, Tensor], None],
    ) -> None:
        self._world, self._comm, self._ranks, self._name = world, comm, ranks, name
        self._by_messages = by_messages
        self._wish = _wish(world)
        self._times: dict[tuple[int, str], float] = {}
        self.windows: DeviceWindows | None = None
        self.reason = f"MPMP_GPU_WAY={self._wish}"
        if self._wish in ("", "ipc"):
            self.windows, self.reason = open_windows(world, comm, ranks, name)
            if self.windows is not None:
                self.windows.drive_by(progress, started)
            elif self._wish:
                raise ConfigError(f"MPMP_GPU_WAY=ipc cannot be on group {name}: {self.reason}")

    def choose(self, nbytes: int) -> str:
        """The fastest way for so many bytes."""
        windows = ["ipc"] if self.windows is not None else []
        return self._wish or self._fastest(nbytes, [*windows, *self._messages()])

    def choose_messages(self, nbytes: int) -> str:
        """The faster one, "straight" or "staged", where it is none for windows."""
        known = self._wish if self._wish in ("straight", "staged") else ""
        return known or self._fastest(nbytes, self._messages())

    def _messages(self) -> list[str]:
        return ["straight", "staged"] if self._world.cuda_aware else ["staged"]

    def _fastest(self, nbytes: int, ways: list[str]) -> str:
        if len(ways) == 1 or self._world.device.type != "cuda":
            return ways[0]
        size = size_class(nbytes)
        new = [way for way in ways if (size, way) not in self._times]
        if new:
            times = measure(self._world, self._comm, self._name, size, new, self._try)
            self._times.update({(size, way): times[way] for way in new})
        return min(ways, key=lambda way: self._times[size, way])

    def _try(self, way: str, x: Tensor) -> None:
        if way != "ipc":
            self._by_messages(way, x)
            return
        assert self.windows is not None
        spec = Spec("allreduce", "window", x.dtype, (0, x.numel()))
        self.windows.carry_out(spec, REDUCTIONS["sum"], x, 0, x, 0)


def _wish(world: World) -> str:
    wish = os.environ.get("MPMP_GPU_WAY", "")
    if wish not in ("", "ipc", "straight", "staged"):
        raise ConfigError(
            f"MPMP_GPU_WAY may be ipc, straight, staged or unset (measure), not {wish!r}"
        )
    if wish == "straight" and not world.cuda_aware:
        raise ConfigError(f"MPMP_GPU_WAY=straight cannot be: {world.gpu_path}")
    return wish


def measure(
    world: World,
    comm: MPI.Intracomm,
    name: str,
    nbytes: int,
    ways: Sequence[str],
    sum_by: Callable[[str, Tensor], None],
) -> dict[str, float]:
    """Seconds of each way of summing so many bytes: the slowest rank's median."""
    classes = world.gather_texts(f"{nbytes} B by {' or '.join(ways)}", comm)
    if len(set(classes)) > 1:
        raise TensorError(
            f"the ranks of group {name} disagree on what to do, about {', '.join(classes)}; all "
            "must make the same calls with the same shapes"
        )
    x = torch.zeros(nbytes // 4, device=world.device)
    mine = [_median_s(partial(sum_by, way, x)) for way in ways]
    all_ = world.gather_texts(",".join(map(repr, mine)), comm)
    columns = zip(*([float(one) for one in text.split(",")] for text in all_), strict=True)
    return dict(zip(ways, map(max, columns), strict=True))


def _median_s(work: Callable[[], None]) -> float:
    times = []
    for _ in range(WARMUPS + REPEATS):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return statistics.median(times[WARMUPS:])


def size_class(nbytes: int) -> int:
    """The power of two from ``nbytes`` down, within what is worth measuring."""
    return min(max(1 << (max(nbytes, 1).bit_length() - 1), SMALLEST_BYTES), LARGEST_BYTES)
