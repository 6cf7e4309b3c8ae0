"""Which layers the stages get: evenly, by hand, or by what they were measured to cost."""

from __future__ import annotations

import time
from contextlib import nullcontext

import pytest
import torch

import mpmp
from mpmp.errors import LayoutError
from mpmp.parallel.parts import Costs, measure_costs, parts
from mpmp.programs.schedules import SCHEDULES
from ranks.staged import MLPStage, microbatches_of

pytestmark = pytest.mark.ranks(2)


def layers_of(name, ranks, layers, cut, costs=None):
    """Layers of every stage, in the order of the stages."""
    found = [
        part
        for rank in range(ranks)
        for part in parts(SCHEDULES[name], rank, ranks, layers, cut, costs)
    ]
    return [one.layers for one in sorted(found, key=lambda one: one.number)]


@pytest.mark.parametrize(
    ("cut", "expected"),
    (
        ("even", [(0, 3), (3, 6), (6, 8)]),
        ("4,3,1", [(0, 4), (4, 7), (7, 8)]),
        ("0,8,0", [(0, 0), (0, 8), (8, 8)]),
    ),
)
def test_layers_of_each_stage(world, cut, expected):
    assert layers_of("1f1b", 3, 8, cut) == expected


def test_embedding_and_head_weigh_as_layers_in_the_measured_cut(world):
    assert layers_of("gpipe", 2, 8, "measured", Costs(0.0, 1.0, 4.0)) == [(0, 6), (6, 8)]
    assert layers_of("gpipe", 2, 8, "measured", Costs(3.0, 1.0, 3.0)) == [(0, 4), (4, 8)]
    assert layers_of("gpipe", 4, 4, "measured", Costs(9.0, 1.0, 9.0))[-1] == (4, 4)


@pytest.mark.parametrize(
    ("name", "shared"), (("1f1b", (0, 2)), ("interleaved", (0, 2)), ("zb_v", ()))
)
def test_chunks_come_in_their_order_and_the_ends_know_of_each_other(world, name, shared):
    schedule = SCHEDULES[name]
    for rank in range(3):
        own = parts(schedule, rank, 3, 6)
        numbers = [schedule.stage_of(rank, chunk, 3) for chunk in range(schedule.chunks)]
        assert [one.number for one in own] == numbers
        assert all(one.shared == shared and one.stages == 3 * schedule.chunks for one in own)


@pytest.mark.parametrize(
    ("name", "cut", "said"),
    (
        ("1f1b", "even", "on 8 ranks has 8 stages, more than the model's 6 layers"),
        ("zb_v", "measured", "on 8 ranks, 2 each has 16 stages, more than the model's 6 layers"),
        ("1f1b", "3,3", "use at least 8 layers or fewer pipeline ranks"),
    ),
)
def test_more_stages_than_layers_are_refused(world, name, cut, said):
    with pytest.raises(LayoutError, match=said):
        parts(SCHEDULES[name], 0, 8, 6, cut)


@pytest.mark.parametrize("cut", ("3,3,3", "4,4", "4,0,4,0"))
def test_numbers_by_hand_share_out_all_layers(world, cut):
    with pytest.raises(LayoutError, match=r"8 layers out to 4 stages.*as in 2,2,2,2"):
        parts(SCHEDULES["1f1b"], 0, 4, 8, cut)


def test_measured_costs_are_those_of_rank_0_everywhere(world):
    mesh = mpmp.mesh(pipeline=2)

    class Slow(MLPStage):
        def forward(self, x, microbatch):
            time.sleep((0.01, 0.03, 0.0)[self.part.number] * (1 + mesh.world.rank))
            return super().forward(x, microbatch)

        def losses(self, x, microbatch):
            time.sleep(0.02)
            return super().losses(x, microbatch)

    _, batch = microbatches_of([2], torch.Generator().manual_seed(1))
    costs = measure_costs(lambda part: Slow(mesh, part), batch, mesh, nullcontext)
    everywhere = mesh.everyone.allgather(torch.tensor([[costs.embedding, costs.layer, costs.head]]))
    assert (everywhere == everywhere[0]).all()
    assert costs.embedding >= 0.01 and costs.head >= 0.02 and costs.layer >= 0.03
    assert max(costs.embedding, costs.head) < costs.layer < 0.055
    mesh.free()
