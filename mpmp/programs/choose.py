"""Choose: which algorithm moves a buffer, and why.

By what was measured on a group of the same size on as many hosts; else by what the measured links
predict; else by thresholds: those of shared windows and between hosts are ours, the others MPICH's
(Thakur, Rabenseifner, Gropp 2005): few rounds for short messages, few bytes for long ones.

Whoever chooses with the same arguments chooses the same: all ranks of a group must.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import log2

from mpmp.errors import ConfigError
from mpmp.programs.cluster import Links
from mpmp.programs.collectives import COLLECTIVES
from mpmp.programs.predict import predict
from mpmp.programs.tables import look_up
from mpmp.programs.tuning import Entry, Table
from mpmp.programs.windows import WindowAlgorithm

KIB = 1024
_ONE_SHOT = 4 * KIB  # read by each rank: n bytes of every rank
_ONE_SHOT_IN_SLOTS = 128 * KIB  # above, a wait more costs less than reading all
_SHORT_ALLREDUCE = 2 * KIB
# Between hosts a chunk of this length travels longer than a latency. Rounds of a ring are equal:
# two that are under way on one link take turns and hide each other's latencies.
RING_CHUNK = 64 * KIB
_SHORT_REDUCE_SCATTER = 512 * KIB
_SHORT_ALLGATHER = 80 * KIB
_SHORT_ALLGATHER_OF_A_POWER = 512 * KIB
_SHORT_BROADCAST = 12 * KIB
_FEW_RANKS_BROADCAST = 8
_SHORT_ALLTOALL_BLOCK = 256
_MANY_RANKS_ALLTOALL = 8
# A prediction follows the program, which is quick enough for this many ranks.
_MOST_PREDICTED = 256

REDUCING = ("allreduce", "reduce_scatter", "reduce")
_WINDOWS = ("allreduce", "reduce_scatter", "allgather", "broadcast", "barrier")


@dataclass(frozen=True, slots=True)
class Choice:
    """The name of an algorithm, and the sentence that says why it was taken."""

    algorithm: str
    reason: str


def choose(
    collective: str,
    size: int,
    nbytes: int,
    *,
    hosts: int | Sequence[int] = 1,
    shared: bool = False,
    table: Table | None = None,
    order: str = "any",
    even: bool = True,
) -> Choice:
    """The algorithm for ``nbytes`` in the whole buffer on ``size`` ranks of ``hosts`` hosts.

    ``hosts``: how many there are, or the number of the host of each rank. ``shared``: all ranks can
    reach each other's windows. ``order`` "fixed": sums must be in rank order. ``even``: all ranks
    give and get pieces of one length.
    """
    if not isinstance(hosts, int):
        hosts = len(set(hosts)) or 1
    legal = _legal(collective, size, hosts, shared, order, even)
    if size > 1 and table is not None:
        choice = _measured(table, legal, collective, size, nbytes, hosts, shared)
        choice = choice or _predicted(table.links, legal, collective, size, nbytes, hosts)
        if choice:
            return choice
    algorithm, reason = _default(collective, size, nbytes, hosts, shared, order, even)
    return Choice(algorithm, f"built-in default: {reason}")


def through_slots(size: int, nbytes: int) -> str:
    """The allreduce of tensors in memory that the other ranks cannot reach."""
    return "one_shot" if nbytes * size <= _ONE_SHOT_IN_SLOTS else "two_shot"


def _legal(
    collective: str, size: int, hosts: int, shared: bool, order: str, even: bool
) -> tuple[str, ...]:
    """The names that may be taken at all."""
    found = []
    for name, algorithm in look_up(COLLECTIVES, collective, "collective").items():
        if isinstance(algorithm, WindowAlgorithm) and not shared:
            continue
        if order == "fixed" and collective in REDUCING and not algorithm.fixed_order:
            continue
        if "hosts" in algorithm.facts and not 1 < hosts < size:
            continue
        if collective == "alltoall" and name == "bruck" and not even:
            continue
        found.append(name)
    if not found:
        raise ConfigError(
            f'no {collective} algorithm sums in rank order; ask allreduce for order="fixed" instead'
        )
    return tuple(found)


def _measured(
    table: Table,
    legal: tuple[str, ...],
    collective: str,
    size: int,
    nbytes: int,
    hosts: int,
    shared: bool,
) -> Choice | None:
    """The fastest at the measured length nearest to ``nbytes``, as lengths go: by ratio."""
    group = [
        entry
        for entry in table.entries
        if (entry.collective, entry.ranks, entry.hosts) == (collective, size, hosts)
        and entry.algorithm in legal
    ]
    placement = "window" if shared else "ordinary"
    group = [entry for entry in group if entry.placement == placement] or group
    if not group:
        return None

    def far(entry: Entry) -> tuple[float, int]:
        return abs(log2(max(entry.bytes, 1)) - log2(max(nbytes, 1))), entry.bytes

    nearest = min(group, key=far).bytes
    times = sorted((entry.time_us, entry.algorithm) for entry in group if entry.bytes == nearest)
    told = f"{times[0][1]} took {times[0][0]:,.1f} us"
    if len(times) > 1:
        told += f" and {times[1][1]} {times[1][0]:,.1f} us"
    at = f"{size} ranks of {_hosts(hosts)}"
    return Choice(
        times[0][1],
        f"measured: at {nearest:,} bytes, the length nearest to {nbytes:,}, {told} on {at}",
    )


def _predicted(
    links: Links, legal: tuple[str, ...], collective: str, size: int, nbytes: int, hosts: int
) -> Choice | None:
    """The fastest by the fitted links; None where they do not tell."""
    if size > _MOST_PREDICTED:
        return None
    # Two lengths an octave: what is chosen for many lengths is worked out for few.
    rounded = round(2 ** (round(2 * log2(max(nbytes, 1))) / 2)) if nbytes else 0
    try:
        times = sorted(
            (_seconds(links, collective, name, size, rounded, hosts), name) for name in legal
        )
    except ConfigError:
        return None  # nothing is known of a link that one of them uses: that may be the fastest
    told = f"{times[0][1]} {1e6 * times[0][0]:,.1f} us"
    if len(times) > 1:
        told += f", {times[1][1]} {1e6 * times[1][0]:,.1f} us"
    at = f"{size} ranks of {_hosts(hosts)}"
    return Choice(
        times[0][1], f"predicted from the fitted links for {nbytes:,} bytes on {at}: {told}"
    )


_seconds = lru_cache(maxsize=4096)(predict)


def _default(
    collective: str, size: int, nbytes: int, hosts: int, shared: bool, order: str, even: bool
) -> tuple[str, str]:
    """Name and reason before anything was measured."""
    fixed = order == "fixed" and collective in REDUCING
    if shared and collective in _WINDOWS:
        if collective == "allreduce" and nbytes * size <= _ONE_SHOT:
            return "one_shot", f"all {size} ranks' {nbytes:,} bytes are at most {_ONE_SHOT:,}"
        return "window", f"the windows of all {size} ranks can be reached"
    if fixed:
        return "direct", f"the sum of {size} ranks must be in rank order"
    if collective == "allreduce" and nbytes > _SHORT_ALLREDUCE and 1 < hosts < size:
        long = f"{nbytes:,} bytes are more than {_SHORT_ALLREDUCE:,}"
        return "hierarchical", f"{long} and {size} ranks share {_hosts(hosts)}"
    if collective == "allreduce" and hosts == size and nbytes >= RING_CHUNK * size:
        return "ring", f"{nbytes:,} bytes are at least {RING_CHUNK:,} a rank, each on its own host"
    return _mpich(collective, size, nbytes, even)


def _mpich(collective: str, size: int, nbytes: int, even: bool) -> tuple[str, str]:
    """MPICH's decision where we have its algorithm."""
    power = size & (size - 1) == 0
    match collective:
        case "allreduce":
            return _by_length(nbytes, _SHORT_ALLREDUCE, "recursive_doubling", "rabenseifner")
        case "reduce_scatter":
            return _by_length(nbytes, _SHORT_REDUCE_SCATTER, "recursive_halving", "pairwise")
        case "allgather" if power:
            limit = _SHORT_ALLGATHER_OF_A_POWER - 1
            return _by_length(nbytes, limit, "recursive_doubling", "ring")
        case "allgather":
            return _by_length(nbytes, _SHORT_ALLGATHER, "bruck", "ring")
        case "broadcast" if size <= _FEW_RANKS_BROADCAST:
            return "binomial", f"{size} ranks are at most {_FEW_RANKS_BROADCAST}"
        case "broadcast":
            return _by_length(nbytes, _SHORT_BROADCAST - 1, "binomial", "scatter_allgather")
        case "alltoall":
            block = -(-nbytes // size)
            if not even:
                return "pairwise", "the pieces differ in length"
            if size < _MANY_RANKS_ALLTOALL:
                return "pairwise", f"{size} ranks are fewer than {_MANY_RANKS_ALLTOALL}"
            name, reason = _by_length(block, _SHORT_ALLTOALL_BLOCK - 1, "bruck", "pairwise")
            return name, f"pieces of {reason}"
        case "barrier":
            return "dissemination", "it is the only one"
    return "binomial", "it is the only one"


def _by_length(nbytes: int, limit: int, short: str, long: str) -> tuple[str, str]:
    if nbytes <= limit:
        return short, f"{nbytes:,} bytes are at most {limit:,}"
    return long, f"{nbytes:,} bytes are more than {limit:,}"


def _hosts(hosts: int) -> str:
    return "1 host" if hosts == 1 else f"{hosts} hosts"
