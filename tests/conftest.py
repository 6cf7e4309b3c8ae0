"""Fixtures of all tests; harness/plugin.py says how tests of ranks are written."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from mpmp.comm.world import World

pytest_plugins = ["harness.plugin"]


@pytest.fixture(scope="session")
def world() -> World:
    """The started world, in tests of ranks."""
    from mpmp.comm.world import start

    return start()
