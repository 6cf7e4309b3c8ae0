"""The learning rate over a run, and which weights decay."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mpmp import config
from mpmp.optim.adamw import learning_rate, make_optimizer
from mpmp.parallel.placement import Placement, place

SETTINGS = config.Optimizer(learning_rate=2.0, final_fraction=0.25, warmup_steps=10)


def test_the_rate_climbs_in_steps_and_falls_with_progress():
    rates = [learning_rate(SETTINGS, step, step / 100) for step in range(101)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[4] == pytest.approx(1.0, rel=0.01)
    assert rates[9] == max(rates) == pytest.approx(2.0, rel=0.03)
    assert rates[50] == pytest.approx((2.0 + 0.5) / 2)
    assert rates[100] == pytest.approx(0.5)
    assert all(a >= b for a, b in zip(rates[9:], rates[10:], strict=False))


def test_a_slow_machine_warms_up_in_as_many_steps():
    """Progress may leap on a slow machine; the warm-up does not."""
    assert learning_rate(SETTINGS, 1, 0.2) < 0.5


def test_without_warmup_it_starts_at_the_top_and_goes_nowhere_past_the_end():
    settings = config.Optimizer(learning_rate=1.0, warmup_steps=0, final_fraction=0.0)
    assert learning_rate(settings, 0, 0.0) == 1.0
    assert learning_rate(settings, 9, 1.0) == pytest.approx(0.0, abs=1e-12)
    assert learning_rate(settings, 9, 1.5) == pytest.approx(0.0, abs=1e-12)


def test_matrices_decay_and_biases_do_not_even_stacked_ones():
    def parameter(name, *shape):
        placement = Placement(name, shape, tuple((0, n) for n in shape))
        return place(nn.Parameter(torch.ones(shape)), placement)

    named = {
        "attention.qkv.weight": parameter("attention.qkv.weight", 3, 4, 4),
        "attention.qkv.bias": parameter("attention.qkv.bias", 3, 4),
        "norm1.weight": parameter("norm1.weight", 4),
        "position": parameter("position", 2, 4),
    }
    optimizer = make_optimizer(named.values(), config.Optimizer(weight_decay=0.5))
    for one in named.values():
        one.grad = torch.zeros_like(one)
    optimizer.step()
    decayed = {name for name, one in named.items() if float(one.detach().max()) < 1}
    assert decayed == {"attention.qkv.weight", "position"}
