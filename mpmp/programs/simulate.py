"""Simulate: the time a collective takes on a described cluster.

Collectives, the alpha-beta-gamma model: every rank has one port out and one port in, which work at
the same time. A message of n bytes takes ``alpha + n beta`` from the moment both ports are free;
all steps of a round between two ranks are one message. The messages of a round use a port one after
another, in the order in which the receiver lists them. What arrived is combined at ``gamma`` a byte
once all messages of the rank's round are through; then the rank's next round begins. No rank waits
for another but by messages.

On a ``Cluster`` a message between ranks of one host takes the numbers of ``same_host``, any other
those of ``other_host``. The ranks of a host share ``rails`` ports to others: where k messages of
one round can leave (or enter) it at once, a byte of them takes max(1, k / rails) times as long; a
rank has one port, so k counts the different ranks that send them, or take them in if those are
fewer. That is the fluid model: shares are equal and last for the whole round, there are no packets,
and between hosts nothing is in the way.

Windows: the ranks of one host at one memory; to wait for one another takes ``sync_s``, a byte read
or written ``seconds_per_byte``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mpmp.errors import ConfigError
from mpmp.programs.cluster import Cluster as Cluster
from mpmp.programs.cluster import Link as Link
from mpmp.programs.cluster import Memory as Memory
from mpmp.programs.collectives import COLLECTIVES
from mpmp.programs.rounds import Chunks, Rounds
from mpmp.programs.steps import Algorithm
from mpmp.programs.windows import (
    ALL,
    Await,
    Combine,
    Load,
    Publish,
    WindowAlgorithm,
    touched,
)


def simulate_collective(
    algorithm: Algorithm, size: int, nbytes: int, cluster: Cluster | Link, **facts: Any
) -> float:
    """Seconds until the last of ``size`` ranks has ended, for a buffer of ``nbytes``.

    A ``Link`` joins all ranks alike. On a cluster ranks fill the hosts in order, unless the fact
    ``hosts`` places them. Facts that the algorithm does not take are left out.
    """
    hosts: Sequence[int] = ()
    if isinstance(cluster, Cluster):
        hosts = facts.setdefault("hosts", cluster.placement(size))
        if len(hosts) != size or not set(hosts) <= set(range(cluster.hosts)):
            raise ConfigError(
                f"hosts must give each of the {size} ranks a host below {cluster.hosts}; "
                f"it speaks of {len(hosts)} ranks on hosts {min(hosts)} to {max(hosts)}"
            )
    facts = algorithm.taken(facts)
    num_chunks = algorithm.num_chunks(size, **facts)
    # An all-to-all has an input and an output of n bytes in its buffer.
    copies = num_chunks // size if algorithm in COLLECTIVES.get("alltoall", {}).values() else 1
    chunks = Chunks(nbytes, num_chunks // copies, copies)
    clock = Rounds(size, cluster, hosts)
    for number, one in enumerate(algorithm.program(np.arange(size), size, **facts)):
        clock.play(number, one, chunks)
    return float(clock.now.max())


def simulate_window(
    algorithm: WindowAlgorithm, size: int, nbytes: int, memory: Memory, **facts: Any
) -> float:
    """Seconds until the last of ``size`` ranks of one host has ended, for ``nbytes`` a window."""
    facts = algorithm.taken(facts)
    chunks = Chunks(nbytes, algorithm.num_chunks(size, **facts))
    now = published = np.zeros(size)
    for step in algorithm.program(np.arange(size), size, **facts):
        if isinstance(step, Combine | Load):
            times = sum(touched(step, size))
            now = now + times * chunks.bytes_of(step) * memory.seconds_per_byte
        elif isinstance(step, Await):
            others = published.max() if np.all(step.source == ALL) else published[step.source]
            now = np.maximum(now, others) + memory.sync_s
        elif isinstance(step, Publish):
            published = now
    return float(now.max())
