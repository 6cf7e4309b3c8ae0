"""Fixtures of the tests that need a GPU; several ranks may share one card.

Every test runs with GPU tensors staged through pinned memory and, where MPI was found to be
CUDA-aware, handed straight to MPI. With MPMP_GPU_DRY=1 all run on the CPU: a trial of the tests.
"""

from __future__ import annotations

import dataclasses
import os

import pytest
import torch

from mpmp.comm.group import Group
from mpmp.comm.mesh import Mesh
from mpmp.comm.world import World

DRY = os.environ.get("MPMP_GPU_DRY") == "1"

if not DRY and not torch.cuda.is_available():
    # One file is left to say "needs a GPU"; hundreds of skips would cost time and say no more.
    collect_ignore = ["test_device_collectives.py", "test_device_streams.py"]


@pytest.fixture(scope="session")
def device(world: World) -> torch.device:
    if world.device.type != "cuda" and not DRY:
        pytest.skip("needs a GPU")
    return world.device


# Of the session, so that pytest runs all staged tests first: a straight one may crash the ranks.
@pytest.fixture(scope="session", params=["staged", "straight"])
def group(request: pytest.FixtureRequest, world: World, device: torch.device) -> Group:
    """All ranks, whose GPU tensors take one of the two ways."""
    straight = request.param == "straight"
    if straight and not world.cuda_aware and not DRY:
        pytest.skip(f"needs a GPU-aware MPI; here GPU tensors are {world.gpu_path}")
    return Mesh.over(dataclasses.replace(world, cuda_aware=straight)).everyone
