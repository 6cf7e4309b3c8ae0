"""What the probe says here, and that all ranks heard the same."""

from __future__ import annotations

import pytest
import torch

from mpmp.comm.world import World

pytestmark = pytest.mark.ranks(1, 2, 4)


def test_all_ranks_take_the_same_way(world: World, device: torch.device) -> None:
    ways = world.gather_texts(f"{world.cuda_aware} {world.gpu_path}")
    print(ways[0])
    assert len(set(ways)) == 1
    if device.type == "cuda":
        assert world.gpu_path.startswith("straight" if world.cuda_aware else "staged")
