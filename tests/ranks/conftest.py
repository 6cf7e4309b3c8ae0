"""Fixtures of rank tests that work in windows."""

from __future__ import annotations

import pytest

from mpmp.comm import lane
from mpmp.comm.window import Windows
from mpmp.programs.collectives import COLLECTIVES
from ranks.windowed import PROGRAMS


@pytest.fixture(scope="session")
def window_programs():
    """The window programs stand in the table under their names."""
    with pytest.MonkeyPatch.context() as patch:
        for (collective, name), algorithm in PROGRAMS.items():
            patch.setitem(COLLECTIVES[collective], name, algorithm)
        yield


@pytest.fixture(params=("compiled", "torch"))
def sums(request, monkeypatch):
    """Steps in C, or in Python with sums in torch, as where there is no compiler."""
    if request.param == "torch":
        monkeypatch.setattr(lane, "kernels", lambda: None)
    else:
        assert lane.kernels() is not None, "tests of the kernels need a C compiler"
    return request.param


@pytest.fixture
def windows(world, window_programs):
    """Windows of all ranks, with their lane."""
    found = Windows(world, world.shares, world.comm, tuple(range(world.size)), "all")
    assert found.ready()
    yield found
    found.free()
