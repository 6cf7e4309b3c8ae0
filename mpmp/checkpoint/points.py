"""Points of a save at which a fault may strike: ``point(name)`` marks one, and does nothing.

Those from "in a shard" on are passed in a thread where the save is in the background.
"""

from __future__ import annotations

from collections.abc import Callable

NAMES = (
    "before shards",
    "in a shard",
    "shard written",
    "shard synced",
    "all synced",
    "manifest",
    "renamed",
    "latest",
    "pruning",
    "pruned",
)
"""In the order of the protocol; every rank passes those up to "all synced", rank 0 the others."""


def _nothing(name: str) -> None:
    pass


hook: Callable[[str], None] = _nothing
"""Called at each point; replaced by whoever injects faults."""


def point(name: str) -> None:
    """Come by a point of the protocol."""
    assert name in NAMES, name
    hook(name)
