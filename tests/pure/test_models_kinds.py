"""The table of kinds, and recomputation, which needs no ranks."""

from __future__ import annotations

from typing import get_args, get_type_hints

import pytest
import torch
from torch import nn

from mpmp import config
from mpmp.models import MODELS
from mpmp.parallel.recompute import recomputed


def test_every_kind_that_may_be_set_stands_in_the_table():
    assert set(get_args(get_type_hints(config.Model)["kind"])) == set(MODELS)


class Counted(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.5, -1.5], dtype=torch.float64))
        self.calls = 0

    def forward(self, x, factor):
        self.calls += 1
        return (x * self.weight).sin().exp() * factor


def gradients(module, function):
    x = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    y = function(module, x, 3.0)
    y.sum().backward()
    return [y.detach(), x.grad, module.weight.grad]


def test_what_is_computed_again_has_the_same_gradients():
    plain, again = Counted(), Counted()
    expected = gradients(plain, lambda module, *arguments: module(*arguments))
    found = gradients(again, recomputed)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert (plain.calls, again.calls) == (1, 2)


def test_without_a_graph_nothing_is_computed_again():
    module = Counted()
    with torch.no_grad():
        recomputed(module, torch.ones(2, dtype=torch.float64), 1.0)
    assert module.calls == 1


def test_only_the_arguments_are_kept():
    """Saved tensors are counted by what stays alive between forward and backward."""
    sizes = []

    def wide(x):
        inner = x.repeat(1000).sin()
        inner.register_hook(lambda _: None)
        sizes.append(inner)
        return inner.cos().sum()

    x = torch.ones(10, requires_grad=True)
    y = recomputed(wide, x)
    reference = __import__("weakref").ref(sizes.pop())
    assert reference() is None  # nobody holds it
    y.backward()
    assert x.grad is not None and len(sizes) == 1


def test_autocast_is_entered_again():
    seen = []

    def product(x, weight):
        y = x @ weight
        seen.append(y.dtype)
        return y.sin()

    x = torch.ones(2, 2, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = recomputed(product, x, torch.ones(2, 2))
    y.sum().backward()
    assert seen == [torch.bfloat16, torch.bfloat16]


def test_a_function_that_saves_otherwise_the_second_time_is_found():
    calls = []

    def moody(x):
        calls.append(1)
        return x.sin().exp() if len(calls) > 1 else x.sin()

    y = recomputed(moody, torch.ones(2, requires_grad=True))
    with pytest.raises(AssertionError, match="save the same tensors"):
        y.sum().backward()
