"""Figures of this machine as markdown: who it is, its kernel, and allreduce by every way.

mpirun -n 2 python tests/gpu/measure.py
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator

import torch
from mpi4py import MPI
from torch import Tensor

from mpmp.comm.device_path import open_windows
from mpmp.comm.device_window import DeviceWindows
from mpmp.comm.mesh import Mesh
from mpmp.comm.reductions import REDUCTIONS
from mpmp.comm.spec import Spec
from mpmp.comm.world import World, start

Way = tuple[str, Callable[[Tensor], object], Callable[[int], Tensor]]

DRY = os.environ.get("MPMP_GPU_DRY") == "1"
SIZES_BYTES = (4 << 10, 1 << 20) if DRY else (4 << 10, 256 << 10, 4 << 20, 64 << 20, 256 << 20)
REPEATS = 20


def main() -> None:
    world = start()
    if world.rank == 0:
        print(machine(world))
    windows, why = open_windows(world, world.comm.Dup(), tuple(range(world.size)), "everyone")
    if world.rank == 0:
        print(f"- windows: {'by CUDA IPC' if windows else 'none'} ({why})")
        print(kernel(world.device), flush=True)
        print(head(world))
    staged: dict[int, float] = {}
    for way, allreduce, empty in ways(world, windows):
        for nbytes in SIZES_BYTES:
            median_s = median_of_allreduce(world, allreduce, empty(nbytes // 4))
            if world.rank == 0:
                over = staged.setdefault(nbytes, median_s) / median_s
                print(row(way, nbytes, median_s, over, world.size), flush=True)


def ways(world: World, windows: DeviceWindows | None) -> Iterator[Way]:
    """Name, allreduce in place, memory; staged comes first, the others are compared with it."""

    def ordinary(length: int) -> Tensor:
        return torch.ones(length, device=world.device)

    for name, straight in (("staged", False), ("straight", True)):
        if straight and not world.cuda_aware:
            continue
        os.environ["MPMP_GPU_WAY"] = name  # no other, were it faster
        group = Mesh.over(dataclasses.replace(world, cuda_aware=straight)).everyone
        yield name, lambda x, group=group: group.allreduce(x, out=x), ordinary
    if windows is None:
        return

    def in_window(length: int) -> Tensor:
        found = windows.empty((length,), torch.float32)
        assert found is not None, "no room on the GPU"
        return found.fill_(1)

    def summed(x: Tensor) -> None:
        spec = Spec("allreduce", "window", x.dtype, (0, x.numel()))
        windows.carry_out(spec, REDUCTIONS["sum"], x, 0, x, 0)

    yield "ipc, in a window", summed, in_window
    yield "ipc, ordinary", summed, ordinary


def machine(world: World) -> str:
    facts = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Linux {platform.release()}",
        "GPU": "none: a dry run on the CPU",
        "torch": f"{torch.__version__}, Python {platform.python_version()}",
        "MPI": " ".join(MPI.Get_library_version().split(",")[0].split()),
        "GPU tensors": world.gpu_path,
    }
    if world.device.type == "cuda":
        facts["GPU"] = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(world.device)}"
        facts["GPU"] += f", driver {driver()}, CUDA {torch.version.cuda}"
    return "\n".join(f"- {name}: {fact}" for name, fact in facts.items())


def head(world: World) -> str:
    what = f"Allreduce of float32, {world.size} ranks, {world.device.type}, in place, median of"
    what += f" {REPEATS}; the time of the slowest rank, its waits for the GPU included."
    columns = "| way | size | time | algbw | busbw | over staged |\n|---|---|---|---|---|---|"
    return f"\n{what}\n\n{columns}"


def driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return run.stdout.split("\n")[0].strip() or "unknown"


def median_of_allreduce(world: World, allreduce: Callable[[Tensor], object], x: Tensor) -> float:
    times = []
    for _ in range(3 + REPEATS):
        world.gather_texts("all are here")
        began = time.perf_counter()
        allreduce(x)
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
        times.append(time.perf_counter() - began)
        x.fill_(1)  # sums of sums would be infinite soon
    said = world.gather_texts(",".join(map(repr, times[3:])))
    return statistics.median(
        max(one)
        for one in zip(*([float(t) for t in text.split(",")] for text in said), strict=True)
    )


def row(way: str, nbytes: int, seconds: float, over: float, size: int) -> str:
    """busbw as nccl-tests define it: 2 (p-1)/p of the bytes."""
    algbw = nbytes / seconds / 1e9
    busbw = algbw * 2 * (size - 1) / size
    kib = nbytes // 1024
    name = f"{kib} KiB" if kib < 1024 else f"{kib // 1024} MiB"
    figures = f"{seconds * 1e6:.0f} us | {algbw:.2f} GB/s | {busbw:.2f} GB/s | {over:.2f}x"
    return f"| {way} | {name} | {figures} |"


# --- the kernel -----------------------------------------------------------------------------------


def kernel(device: torch.device) -> str:
    """Bytes a second of the kernel beside those of a copy, both read and written."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return "- kernel: not measured, it needs a GPU and Triton"
    lines = []
    for dtype in (torch.float32, torch.bfloat16):
        ours, copy = bandwidths(device, dtype)
        word = str(dtype).removeprefix("torch.")
        lines.append(
            f"- kernel, 2 sources and targets of 256 MiB, {word}: {ours:.0f} GB/s read and "
            f"written = {ours / copy:.0%} of the {copy:.0f} GB/s of a copy, median of {REPEATS}"
        )
    return "\n".join(lines)


def bandwidths(device: torch.device, dtype: torch.dtype, num: int = 2) -> tuple[float, float]:
    """GB/s of sum and publish in place over ``num`` tensors of 256 MiB, and of torch's copy."""
    from mpmp_kernels.triton_sum_publish import sum_publish

    length = (256 << 20) // dtype.itemsize
    tensors = [torch.zeros(length, dtype=dtype, device=device) for _ in range(num)]
    where = [x.data_ptr() for x in tensors]
    ours_s = median_on_gpu(lambda: sum_publish(where, where, length, dtype, device))
    copy_s = median_on_gpu(lambda: tensors[0].copy_(tensors[1]))
    nbytes = 2 * length * dtype.itemsize
    return num * nbytes / ours_s / 1e9, nbytes / copy_s / 1e9


def median_on_gpu(work: Callable[[], object]) -> float:
    """Seconds between two events of the stream, launch not included."""
    times = []
    for _ in range(3 + REPEATS):
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(1_000_000)  # the launches are queued before the first event
        first.record()
        work()
        last.record()
        last.synchronize()
        times.append(first.elapsed_time(last) / 1e3)
    return statistics.median(times[3:])


if __name__ == "__main__":
    main()
