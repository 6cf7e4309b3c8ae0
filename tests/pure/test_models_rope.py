"""Rotary positions turn pairs of features, and products depend on distances alone."""

from __future__ import annotations

import cmath

import torch

from mpmp.models.rope import turn, turns

HEAD = 6


def turned(x_K, place):
    cosines_and_sines = turns(torch.tensor([place]), HEAD, torch.float64)
    return turn(x_K.view(1, 1, 1, HEAD), cosines_and_sines).flatten()


def test_a_pair_is_a_complex_number_that_turns():
    x_K = torch.arange(1.0, HEAD + 1, dtype=torch.float64)
    found = turned(x_K, 5)
    for pair in range(HEAD // 2):
        number = complex(x_K[pair], x_K[pair + HEAD // 2])
        expected = number * cmath.exp(1j * 5 * 10_000 ** (-2 * pair / HEAD))
        assert abs(complex(found[pair], found[pair + HEAD // 2]) - expected) < 1e-12


def test_products_depend_on_the_distance_alone():
    q_K, k_K = torch.randn(2, HEAD, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    near, far = (turned(q_K, 3 + at) @ turned(k_K, 1 + at) for at in (0, 40))
    assert abs(float(near - far)) < 1e-12
    assert abs(float(near - turned(q_K, 4) @ turned(k_K, 1))) > 1e-3


def test_16_bits_come_back_as_16_bits():
    """But angles and products are float32: 16 bits would not tell late positions apart."""
    places = torch.tensor([1000, 1001])
    x = torch.ones(1, 1, 2, HEAD, dtype=torch.bfloat16)
    found = turn(x, turns(places, HEAD, torch.float32))
    assert found.dtype is torch.bfloat16
    assert not torch.equal(found[0, 0, 0], found[0, 0, 1])
