"""Gradients that layers write where they are summed, and casts that last a step."""

from __future__ import annotations

import torch
from torch import nn

from mpmp.parallel import landing


def test_the_first_gradient_is_written_and_later_ones_are_added() -> None:
    parameter, memory = nn.Parameter(torch.ones(2, 3)), torch.full((2, 3), 7.0)
    product = torch.arange(6.0).bfloat16().view(2, 3)
    assert not landing.add(parameter, product) and parameter.grad is None
    landing.begin(parameter, memory)
    for times in (1, 2, 3):
        assert landing.add(parameter, product)
        assert parameter.grad is memory and torch.equal(memory, times * product.float())
    landing.end(parameter)
    assert not landing.add(parameter, product)


def test_a_cast_lasts_a_step() -> None:
    parameter = nn.Parameter(torch.full((4,), 1.0))
    landing.begin(parameter, torch.zeros(4))
    cast = landing.cast(parameter, torch.bfloat16)
    assert cast.dtype is torch.bfloat16 and landing.cast(parameter, torch.bfloat16) is cast
    assert landing.cast(parameter, torch.float32) is parameter
    landing.end(parameter)
    with torch.no_grad():
        parameter += 1
    assert torch.equal(landing.cast(parameter, torch.bfloat16), torch.full((4,), 2.0).bfloat16())
