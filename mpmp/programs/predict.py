"""Predict: the time of an algorithm on links of which something is known, and where two cross."""

from __future__ import annotations

from math import sqrt
from typing import Protocol

from mpmp.errors import ConfigError
from mpmp.programs.cluster import Cluster, Link, Links
from mpmp.programs.collectives import find
from mpmp.programs.simulate import simulate_collective, simulate_window
from mpmp.programs.windows import WindowAlgorithm


class Fitted(Protocol):
    """Whatever has links: a fit, a tuning table."""

    @property
    def links(self) -> Links: ...


Known = Fitted | Links | Link
"""What a prediction can be made of; a Link joins all ranks alike."""


def predict(
    known: Known, collective: str, algorithm: str, size: int, nbytes: int, hosts: int = 1
) -> float:
    """Seconds that the algorithm takes on ``size`` ranks, which fill ``hosts`` hosts in order."""
    return _seconds(_links(known), collective, algorithm, size, nbytes, hosts)


def _links(known: Known) -> Links:
    if isinstance(known, Link):
        return Links(known, known)
    return known if isinstance(known, Links) else known.links


def crossover(
    known: Known, collective: str, a: str, b: str, size: int, hosts: int = 1
) -> int | None:
    """Bytes from which on the other one of ``a`` and ``b`` is faster than for short buffers.

    To 0.05 %, among lengths that the ranks divide; None where one of them is faster, or as fast,
    from a byte a rank to 1 TiB.
    """
    links = _links(known)

    def first_wins(piece: int) -> bool:
        times = [_seconds(links, collective, name, size, piece * size, hosts) for name in (a, b)]
        return times[0] <= times[1]

    low, high = 1, (1 << 40) // size
    begins = first_wins(low)
    if first_wins(high) == begins:
        return None
    while high > low + 1 and high > 1.0005 * low:
        middle = max(low + 1, int(sqrt(low) * sqrt(high)))
        low, high = (middle, high) if first_wins(middle) == begins else (low, middle)
    return high * size


def segments_of(nbytes: int) -> int:
    """Into how many pieces a pipeline cuts ``nbytes``: of 64 KiB each, of 256 KiB from 4 MiB on."""
    piece = 64 * 1024 if nbytes < 4 << 20 else 256 * 1024
    return max(1, nbytes // piece)


def _seconds(links: Links, collective: str, name: str, size: int, nbytes: int, hosts: int) -> float:
    algorithm = find(collective, name)
    if isinstance(algorithm, WindowAlgorithm):
        if links.memory is None:
            raise ConfigError(f"nothing is known of windows: measure {name} to predict {name}")
        return simulate_window(algorithm, size, nbytes, links.memory)
    ranks_per_host = -(-size // hosts)
    near, far = links.same_host, links.other_host
    network: Cluster | Link | None = near if hosts == 1 else far
    if hosts > 1 and ranks_per_host > 1:
        network = Cluster(hosts, ranks_per_host, near, far) if near and far else None
    if network is None:
        raise ConfigError(
            f"nothing is known of a link that {size} ranks on {hosts} hosts use: measure on as many"
        )
    return simulate_collective(
        algorithm,
        size,
        nbytes,
        network,
        hosts=tuple(rank // ranks_per_host for rank in range(size)),
        segments=segments_of(nbytes),
    )
