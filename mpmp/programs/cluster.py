"""A described cluster: hosts, the ranks on them, and what a byte costs between and inside them.

      host 0: 0 1 2 3 === rails === host 1: 4 5 6 7       ranks fill the hosts in order
              same_host           other_host

Nothing here is measured: numbers come from a description or from ``fit.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from math import isfinite
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpmp.errors import ConfigError


def _demand_times(what: object) -> None:
    """Refuse a time that is negative, infinite or not a number."""
    for field in fields(what):  # type: ignore[arg-type]
        value = getattr(what, field.name)
        if not (isfinite(value) and value >= 0):
            raise ConfigError(
                f"{type(what).__name__} needs {field.name} finite and not negative, not {value}"
            )


@dataclass(frozen=True, slots=True)
class Link:
    """Seconds per message, per byte sent and per byte combined."""

    alpha_s: float
    beta_s_per_byte: float
    gamma_s_per_byte: float = 0.0

    def __post_init__(self) -> None:
        _demand_times(self)


@dataclass(frozen=True, slots=True)
class Memory:
    """Shared memory of a host: seconds to wait for one another, and per byte read or written.

    The byte is timed while all ranks of the host are at it, so that their sharing of the memory
    is in the number.
    """

    sync_s: float
    seconds_per_byte: float

    def __post_init__(self) -> None:
        _demand_times(self)


@dataclass(frozen=True, slots=True)
class Links:
    """What is known of a machine, by link class; None was not measured."""

    same_host: Link | None = None
    other_host: Link | None = None
    memory: Memory | None = None


@dataclass(frozen=True, slots=True)
class Cluster:
    """``hosts`` hosts with ``ranks_per_host`` ranks each, which share ``rails`` ports there."""

    hosts: int
    ranks_per_host: int
    same_host: Link
    other_host: Link
    rails: int = 1
    name: str = "cluster"

    def __post_init__(self) -> None:
        for what in ("hosts", "ranks_per_host", "rails"):
            value = getattr(self, what)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f'cluster "{self.name}" needs {what} of at least 1, not {value}')

    @property
    def size(self) -> int:
        """The ranks that it has room for."""
        return self.hosts * self.ranks_per_host

    def host_of(self, ranks: Any) -> NDArray[Any]:
        """The number of the host of each of ``ranks``."""
        found: NDArray[Any] = np.asarray(ranks) // self.ranks_per_host
        return found

    def placement(self, size: int) -> tuple[int, ...]:
        """The fact ``hosts`` of a job of ``size``: the number of the host of each rank."""
        if size > self.size:
            raise ConfigError(
                f'cluster "{self.name}" has room for {self.size} ranks ({self.hosts} hosts of '
                f"{self.ranks_per_host}), not for {size}"
            )
        return tuple(self.host_of(np.arange(size)).tolist())

    @classmethod
    def of(cls, described: Mapping[str, Any]) -> Cluster:
        """A cluster out of a dict, as a file has it: links are dicts of Link's three numbers."""
        made: dict[str, Any] = dict(described)
        _demand_keys(made, cls, "cluster")
        for link in ("same_host", "other_host"):
            if not isinstance(made[link], Link):
                _demand_keys(made[link], Link, f"cluster's {link}")
                made[link] = Link(**made[link])
        return cls(**made)


def _demand_keys(described: Any, what: type, of: str) -> None:
    """Refuse names that ``what`` does not have, and say which it needs."""
    known = [field.name for field in fields(what)]
    needed = known[: -2 if what is Cluster else -1]
    found = set(described) if isinstance(described, Mapping) else set()
    if found - set(known) or set(needed) - found:
        raise ConfigError(
            f"a {of} needs {', '.join(needed)} and may have "
            f"{', '.join(known[len(needed) :])}; it has {', '.join(sorted(found)) or 'nothing'}"
        )
