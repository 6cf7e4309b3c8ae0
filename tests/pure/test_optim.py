"""The learning rate over a run, which weights decay, how gradients and the loss are scaled."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mpmp import config
from mpmp.optim.adamw import learning_rate, make_optimizer
from mpmp.optim.clip import clip_
from mpmp.optim.scale import LossScale
from mpmp.parallel import states
from mpmp.parallel.placement import Placement
from mpmp.parallel.zero import Piece

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


def piece(name, *shape, start=0, stop=None):
    """A piece of a parameter of ones, whole where no end is given."""
    placement = Placement(name, shape, tuple((0, n) for n in shape))
    length = placement.numel if stop is None else stop - start
    values = torch.ones(shape) if stop is None else torch.ones(length)
    return Piece(placement, start, start + length, nn.Parameter(values), True)


def test_matrices_decay_and_biases_do_not_even_stacked_ones_nor_pieces_of_one_dim():
    pieces = [
        piece("attention.qkv.weight", 3, 4, 4),
        piece("attention.qkv.bias", 3, 4),
        piece("norm1.weight", 4),
        piece("position", 2, 4),
        piece("mlp.up.weight", 4, 4, start=3, stop=7),
        piece("mlp.up.bias", 4, start=3, stop=4),
    ]
    optimizer = make_optimizer(pieces, config.Optimizer(weight_decay=0.5))
    for one in pieces:
        one.parameter.grad = torch.zeros_like(one.parameter)
    optimizer.step()
    decayed = {one.placement.name for one in pieces if float(one.parameter.detach().max()) < 1}
    assert decayed == {"attention.qkv.weight", "position", "mlp.up.weight"}


def test_a_rank_without_a_piece_takes_the_step_with_the_others():
    make_optimizer([], config.Optimizer()).step()


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_adamw_is_that_of_the_paper(dtype):
    """Algorithm 2 of Loshchilov and Hutter, in plain arithmetic."""
    settings = config.Optimizer(learning_rate=0.1, beta1=0.8, beta2=0.9, weight_decay=0.2)
    own = piece("weight", 3, 5)
    own.parameter.data = torch.linspace(-1, 1, 15, dtype=dtype).view(3, 5)
    optimizer = make_optimizer([own], settings)
    weight = own.parameter.detach().clone().double()
    first = second = torch.zeros(3, 5, dtype=torch.float64)
    for step in range(1, 6):
        gradient = torch.sin(step * torch.arange(15, dtype=torch.float64)).view(3, 5)
        own.parameter.grad = gradient.to(dtype)
        optimizer.step()
        first = 0.8 * first + 0.2 * gradient
        second = 0.9 * second + 0.1 * gradient**2
        moved = first / (1 - 0.8**step) / ((second / (1 - 0.9**step)).sqrt() + 1e-8)
        weight = weight - 0.1 * (moved + 0.2 * weight)
    exact = 1e-14 if dtype == torch.float64 else 1e-6
    assert float((own.parameter.detach() - weight).abs().max()) <= exact


@pytest.mark.parametrize(
    "norm, limit, scale, factor",
    (
        (8.0, 2.0, 1.0, 1 / 4),
        (8.0, 8.0, 1.0, 1.0),
        (8.0, 0.0, 1.0, 1.0),
        (8.0, 2.0, 4.0, 1 / 4),  # the norm is 2 without the scale
        (8.0, 1.0, 4.0, 1 / 8),
        (8.0, 0.0, 4.0, 1 / 4),
    ),
)
def test_gradients_are_clipped_and_freed_of_the_loss_scale(norm, limit, scale, factor):
    one = piece("weight", 2, 2)
    one.parameter.grad = torch.full((2, 2), 4.0)
    clip_([one], norm, limit, scale)
    assert one.parameter.grad.tolist() == [[4 * factor] * 2] * 2


def test_the_loss_scale_grows_after_good_steps_and_is_halved_by_an_overflow():
    scale = LossScale(enabled=True, initial=8.0, growth_steps=3)
    values = []
    for finite in (True, True, True, True, False, True, True, True, False, False):
        assert scale.update(finite) == finite
        values.append(scale.value)
    assert values == [8, 8, 16, 16, 8, 8, 8, 16, 8, 4]
    again = LossScale(enabled=True, growth_steps=3)
    again.load(scale.state())
    assert (again.value, again.state()) == (4.0, scale.state())


def test_without_float16_there_is_no_loss_scale():
    scale = LossScale(enabled=False)
    assert [scale.update(one) for one in (True, False)] == [True, False]
    assert scale.value == 1.0
    float16 = LossScale(enabled=True)
    float16.load(scale.state())  # a run that goes on in float16 begins with a scale
    assert float16.value == LossScale(enabled=True).value > 1.0


@pytest.mark.parametrize("ranks, printed", ((4, (52.5, 41.2, 30.0)), (64, (31.4, 16.6, 1.88))))
def test_bytes_of_the_formula_are_those_of_the_paper(ranks, printed):
    """Table 1 of Rajbhandari et al. 2019: 7.5 B parameters in 16 bits, GB."""
    found = [
        states.formula(7_500_000_000, ranks, stage, itemsizes=(2, 2, 12)).total / 1e9
        for stage in (1, 2, 3)
    ]
    assert found == pytest.approx(printed, rel=4e-3)


def test_bytes_in_float32():
    found = [states.formula(1000, 4, stage) for stage in range(4)]
    assert [one.total for one in found] == [16_000, 10_000, 7_000, 4_000]
