"""Tensors copied past the cache, or by torch, are the same to the byte."""

from __future__ import annotations

import pytest
import torch
from mpmp_kernels import build

from mpmp.checkpoint import copying
from mpmp.checkpoint.copying import copy_all


@pytest.mark.parametrize("way", ["kernel", "torch"])
def test_every_byte_and_none_beside(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """Any length and place, in several turns, contiguous or not."""
    if way == "torch":
        monkeypatch.setattr(build, "library_or_none", lambda: None)
    else:
        assert build.library_or_none() is not None, "tests of the kernels need a C compiler"
    monkeypatch.setattr(copying, "_AT_ONCE_BYTES", 1000)
    memory = torch.zeros(40_000, dtype=torch.uint8)
    wanted, copies, at = memory.clone(), [], 3
    for size in (0, 1, 63, 64, 129, 5000, 20_001):
        one = torch.randint(256, (size,), dtype=torch.uint8)
        copies.append((memory[at : at + size], one))
        wanted[at : at + size] = one
        at += size + 5
    wide = torch.randn(7, 9, dtype=torch.float64).t()
    place = memory[-8 * 63 - 8 : -8].view(torch.float64).view(9, 7)
    wanted[-8 * 63 - 8 : -8] = wide.contiguous().view(torch.uint8).view(-1)
    copy_all([*copies, (place, wide)])
    assert torch.equal(memory, wanted)


def test_what_is_made_for_the_copy_alone_lives_until_it_is_done(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As the elements of a tensor that is not contiguous, side by side."""
    monkeypatch.setattr(copying, "_AT_ONCE_BYTES", 1000)
    wide = [torch.randn(50, 70).t() for _ in range(20)]
    places = [torch.zeros(3500) for _ in wide]
    copy_all((place, one.reshape(-1)) for place, one in zip(places, wide, strict=True))
    for place, one in zip(places, wide, strict=True):
        assert torch.equal(place, one.reshape(-1))
