"""Figures of this machine as markdown: who it is, and allreduce staged and straight.

    mpirun -n 2 python tests/gpu/measure.py
"""

from __future__ import annotations

import dataclasses
import os
import platform
import statistics
import subprocess
import time

import torch
from mpi4py import MPI

from mpmp.comm.group import Group
from mpmp.comm.mesh import Mesh
from mpmp.comm.world import World, start

DRY = os.environ.get("MPMP_GPU_DRY") == "1"
SIZES_BYTES = (4 << 10, 1 << 20) if DRY else (4 << 10, 256 << 10, 4 << 20, 64 << 20, 256 << 20)
REPEATS = 20


def main() -> None:
    world = start()
    if world.rank == 0:
        print(machine(world))
    ways = [("staged", False), *([("straight", True)] if world.cuda_aware else [])]
    for way, straight in ways:
        group = Mesh.over(dataclasses.replace(world, cuda_aware=straight)).everyone
        for nbytes in SIZES_BYTES:
            median_s = median_of_allreduce(group, nbytes, world.device)
            if world.rank == 0:
                print(row(way, nbytes, median_s, group.size), flush=True)


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
    lines = [f"- {name}: {fact}" for name, fact in facts.items()]
    head = ["", f"Allreduce of float32, {world.size} ranks, {world.device.type}, median of"]
    head[-1] += f" {REPEATS}; the time of the slowest rank, its waits for the GPU included."
    head += ["", "| way | size | time | algbw | busbw |", "|---|---|---|---|---|"]
    return "\n".join([*lines, *head])


def driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return run.stdout.split("\n")[0].strip() or "unknown"


def median_of_allreduce(group: Group, nbytes: int, device: torch.device) -> float:
    x = torch.ones(nbytes // 4, device=device)
    out = torch.empty_like(x)
    times = []
    for _ in range(3 + REPEATS):
        group.barrier()
        began = time.perf_counter()
        group.allreduce(x, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    slowest = group.allreduce(torch.tensor(times[3:], dtype=torch.float64), op="max")
    return statistics.median(slowest.tolist())


def row(way: str, nbytes: int, seconds: float, size: int) -> str:
    """busbw as nccl-tests define it: 2 (p-1)/p of the bytes."""
    algbw = nbytes / seconds / 1e9
    busbw = algbw * 2 * (size - 1) / size
    kib = nbytes // 1024
    name = f"{kib} KiB" if kib < 1024 else f"{kib // 1024} MiB"
    return f"| {way} | {name} | {seconds * 1e6:.0f} us | {algbw:.2f} GB/s | {busbw:.2f} GB/s |"


if __name__ == "__main__":
    main()
