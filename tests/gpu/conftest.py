"""Fixtures of the tests that need a GPU; several ranks may share one card.

Tests of a ``group`` run with GPU tensors staged through pinned memory and, where MPI was found to
be CUDA-aware, handed straight to MPI. Windows have tests of their own. With MPMP_GPU_DRY=1 all that
can run on the CPU does: a trial of the tests.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator

import pytest
import torch

from mpmp.comm.device_path import open_windows
from mpmp.comm.device_window import DeviceWindows
from mpmp.comm.group import Group
from mpmp.comm.mesh import Mesh
from mpmp.comm.progress import Progress
from mpmp.comm.world import World

DRY = os.environ.get("MPMP_GPU_DRY") == "1"

if not DRY and not torch.cuda.is_available():
    # One file is left to say "needs a GPU"; hundreds of skips would cost time and say no more.
    collect_ignore = [
        "test_device_collectives.py",
        "test_device_streams.py",
        "test_device_windows.py",
        "test_triton_on_gpu.py",
    ]


@pytest.fixture(scope="session")
def device(world: World) -> torch.device:
    if world.device.type != "cuda" and not DRY:
        pytest.skip("needs a GPU")
    return world.device


# Of the session, so that pytest runs all staged tests first: a straight one may crash the ranks.
@pytest.fixture(scope="session", params=["staged", "straight"])
def group(request: pytest.FixtureRequest, world: World, device: torch.device) -> Iterator[Group]:
    """All ranks, whose GPU tensors take one of the two ways."""
    straight = request.param == "straight"
    if straight and not world.cuda_aware and not DRY:
        pytest.skip(f"needs a GPU-aware MPI; here GPU tensors are {world.gpu_path}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MPMP_GPU_WAY", request.param)  # no other, were it faster
        yield Mesh.over(dataclasses.replace(world, cuda_aware=straight)).everyone


@pytest.fixture(scope="session")
def opened(world: World, device: torch.device) -> tuple[DeviceWindows | None, str]:
    """Windows of all ranks in GPU memory, or why there are none."""
    comm = world.comm.Dup()
    found, why = open_windows(world, comm, tuple(range(world.size)), "everyone")
    if found is not None:
        found.drive_by(Progress(world.until, world.overlap), comm.Dup())
    return found, why


@pytest.fixture
def windows(opened: tuple[DeviceWindows | None, str]) -> DeviceWindows:
    found, why = opened
    if found is None:
        pytest.skip(f"needs a GPU whose memory the ranks can share: {why}")
    return found
