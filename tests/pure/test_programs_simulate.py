"""Times worked by hand, the model once more as slow and obvious code, and thousands of ranks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpmp.errors import ConfigError, ProgramError
from mpmp.programs.cluster import Cluster, Link, Memory
from mpmp.programs.collectives import COLLECTIVES, find
from mpmp.programs.partition import partition
from mpmp.programs.simulate import simulate_collective, simulate_window
from mpmp.programs.steps import (
    NONE,
    Algorithm,
    Cost,
    Receive,
    Reduce,
    Round,
    Send,
    one_per_rank,
    where,
    whole,
)
from mpmp.programs.windows import WindowAlgorithm

MESSAGES = [
    (collective, name)
    for collective, table in COLLECTIVES.items()
    for name, algorithm in table.items()
    if isinstance(algorithm, Algorithm)
]
WINDOWS = [
    (collective, name)
    for collective, table in COLLECTIVES.items()
    for name, algorithm in table.items()
    if isinstance(algorithm, WindowAlgorithm)
]
every_message_algorithm = pytest.mark.parametrize(("collective", "name"), MESSAGES)
NEAR, FAR = Link(2.0, 3.0, 5.0), Link(100.0, 7.0, 11.0)


def made(program: Any, num_chunks: Any = whole, facts: tuple[str, ...] = ()) -> Algorithm:
    return Algorithm(program, num_chunks, lambda size, **facts: Cost(0, Fraction(0)), facts)


def test_steps_to_one_peer_are_one_message() -> None:
    """Two spans of 8 of 32 bytes: one alpha and 16 bytes."""

    def scattered(rank: Any, size: int) -> Iterator[Round]:
        other = 1 - rank
        yield Round(Send(0, other), Send(2, other), Receive(1, other), Reduce(3, other))

    algorithm = made(scattered, lambda size: 4)
    assert simulate_collective(algorithm, 2, 32, Link(100.0, 1.0, 10.0)) == 100 + 16 + 8 * 10


def test_inside_and_between_hosts() -> None:
    """Recursive doubling on 2 x 2: inside first, then both ranks of a host at its one port."""
    doubling = find("allreduce", "recursive_doubling")
    inside = 2 + 10 * 3 + 10 * 5
    for rails, share in ((1, 2), (2, 1), (3, 1)):
        found = simulate_collective(doubling, 4, 10, Cluster(2, 2, NEAR, FAR, rails))
        assert found == inside + 100 + 10 * 7 * share + 10 * 11
    # Placed in turns, ranks 0 and 2 are on one host: between hosts first. It is the same time.
    cluster = Cluster(2, 2, NEAR, FAR)
    assert simulate_collective(doubling, 4, 10, cluster, hosts=(0, 1, 0, 1)) == found + 10 * 7
    assert simulate_collective(doubling, 4, 10, cluster, hosts=(0, 0, 0, 0)) == 2 * inside


def test_a_ring_crosses_at_one_rank_a_host() -> None:
    """Every round somebody waits for the slow link, and before long all do: 6 rounds of n/4."""
    found = simulate_collective(
        find("allreduce", "ring"), 4, 40, Cluster(2, 2, Link(1.0, 0.0), Link(5.0, 2.0))
    )
    assert found == 6 * (5 + 10 * 2)


def test_a_rank_that_sends_to_many_shares_with_nobody() -> None:
    """One port, three messages one after another: the sharing is between ranks, not messages."""

    def star(rank: Any, size: int) -> Iterator[Round]:
        first = rank == 0
        yield Round(
            *(Send(0, where(first, peer, NONE)) for peer in range(1, size)),
            Receive(0, where(first, NONE, 0)),
        )

    cluster = Cluster(2, 2, Link(1.0, 1.0), Link(10.0, 2.0))
    assert simulate_collective(made(star), 4, 5, cluster) == (1 + 5) + 2 * (10 + 10)


def test_the_fact_hosts_comes_from_the_cluster() -> None:
    seen = []

    def asks(rank: Any, size: int, *, hosts: Any = (), root: int = 0) -> Iterator[Round]:
        seen.append((tuple(hosts), root))
        yield Round()

    cluster = Cluster(3, 2, NEAR, FAR)
    for facts in ({}, {"hosts": (2, 1, 0, 0, 1), "root": 3, "segments": 7}):
        simulate_collective(made(asks, facts=("hosts", "root")), 5, 1, cluster, **facts)
    assert seen == [((0, 0, 1, 1, 2), 0), ((2, 1, 0, 0, 1), 3)]


# --- the model once more ------------------------------------------------------------------------


def reference(
    algorithm: Algorithm, size: int, nbytes: int, cluster: Cluster, **facts: Any
) -> float:
    """The docstring of simulate.py, a rank and a message at a time."""
    hosts = facts.setdefault("hosts", cluster.placement(size))
    facts = algorithm.taken(facts)
    parts = algorithm.num_chunks(size, **facts)
    copies = 2 if algorithm in COLLECTIVES.get("alltoall", {}).values() else 1
    length = [stop - start for start, stop in partition(nbytes, parts // copies)] * copies
    programs = [list(algorithm.program(rank, size, **facts)) for rank in range(size)]
    now = [0.0] * size
    for number in range(len(programs[0])):
        puts, place = listed([program[number].steps for program in programs])
        far = [pair for pair in puts if hosts[pair[0]] != hosts[pair[1]]]
        out, into, combining = list(now), list(now), [0.0] * size
        for sender, receiver in sorted(puts, key=place.__getitem__):
            link, share = cluster.same_host, 1.0
            if (sender, receiver) in far:
                leaving = [pair for pair in far if hosts[pair[0]] == hosts[sender]]
                entering = [pair for pair in far if hosts[pair[1]] == hosts[receiver]]
                at_once = [
                    min(len(set(ends)) for ends in zip(*pairs, strict=True))
                    for pairs in (leaving, entering)
                ]
                link, share = cluster.other_host, max(1.0, max(at_once) / cluster.rails)
            amounts = [
                sum(length[put.chunk : put.chunk + put.count]) for put in puts[sender, receiver]
            ]
            end = max(out[sender], into[receiver]) + link.alpha_s
            end += sum(amounts) * link.beta_s_per_byte * share
            out[sender] = into[receiver] = end
            for put, amount in zip(puts[sender, receiver], amounts, strict=True):
                if isinstance(put, Reduce):
                    combining[receiver] += amount * link.gamma_s_per_byte
        now = [max(*pair) + more for *pair, more in zip(out, into, combining, strict=True)]
    return max(now)


Pair = tuple[int, int]


def listed(rounds: list[Any]) -> tuple[dict[Pair, list[Any]], dict[Pair, Pair]]:
    """By (sender, receiver): the steps that take in, and where both first list the message."""
    puts: dict[Pair, list[Any]] = {}
    first_put: dict[Pair, int] = {}
    first_send: dict[Pair, int] = {}
    for place in range(len(rounds[0])):
        for rank, steps in enumerate(rounds):
            step = steps[place]
            if isinstance(step, Send) and step.to != NONE:
                first_send.setdefault((rank, step.to), place)
            elif not isinstance(step, Send) and step.source != NONE:
                first_put.setdefault((step.source, rank), place)
                puts.setdefault((step.source, rank), []).append(step)
    assert first_send.keys() == puts.keys()
    return puts, {pair: (first_put[pair], first_send[pair]) for pair in puts}


@every_message_algorithm
@pytest.mark.parametrize(("size", "per_host"), [(1, 1), (2, 1), (4, 2), (5, 2), (7, 3), (8, 4)])
@pytest.mark.parametrize("nbytes", [0, 3, 96, 1001])
def test_the_vector_does_what_the_ranks_do(
    collective: str, name: str, size: int, per_host: int, nbytes: int
) -> None:
    cluster = Cluster(-(-size // per_host), per_host, NEAR, FAR)
    algorithm = find(collective, name)
    found = simulate_collective(algorithm, size, nbytes, cluster)
    assert found == pytest.approx(reference(algorithm, size, nbytes, cluster), rel=1e-12)


@every_message_algorithm
@pytest.mark.parametrize("size", [2, 5, 8])
def test_a_cluster_of_one_link_is_that_link(collective: str, name: str, size: int) -> None:
    algorithm, link = find(collective, name), Link(2e-6, 3e-10, 7e-11)
    cluster = Cluster(4, 2, link, link, rails=2)
    hosts = cluster.placement(size)
    assert simulate_collective(algorithm, size, 4567, cluster) == pytest.approx(
        simulate_collective(algorithm, size, 4567, link, hosts=hosts), rel=1e-12
    )


times = st.floats(0, 1e3)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(MESSAGES),
    st.integers(1, 12),
    st.integers(0, 999),
    st.builds(Link, times, times, times),
    st.builds(Link, times, times, times),
    st.integers(1, 4),
)
def test_nothing_gets_faster_by_slower_links(
    which: tuple[str, str], size: int, nbytes: int, near: Link, far: Link, rails: int
) -> None:
    algorithm = find(*which)
    base = simulate_collective(algorithm, size, nbytes, Cluster(4, 3, near, far, rails + 1))
    for cluster in (
        Cluster(4, 3, near, far, rails),
        Cluster(4, 3, Link(near.alpha_s + 1, near.beta_s_per_byte, near.gamma_s_per_byte), far, 9),
        Cluster(4, 3, near, Link(far.alpha_s, far.beta_s_per_byte + 1, far.gamma_s_per_byte)),
    ):
        if cluster.rails <= rails + 1:
            again = simulate_collective(algorithm, size, nbytes, cluster)
            assert again >= base * (1 - 1e-12)


# --- windows ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("collective", "name"), WINDOWS)
@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
def test_a_window_takes_what_its_cost_says(collective: str, name: str, size: int) -> None:
    algorithm = find(collective, name)
    cost, nbytes = algorithm.cost(size), 420
    found = simulate_window(algorithm, size, nbytes, Memory(1000.0, 0.5))
    assert found == pytest.approx(cost.syncs * 1000 + float(cost.read + cost.written) * 420 * 0.5)


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "says"),
    [
        (Send(0, 1), "rank 0, round 0: sends to rank 1, which has no partner"),
        (Receive(0, 2), "rank 0, round 0: receives from rank 2, which has no partner"),
    ],
)
def test_a_step_too_many_is_refused(step: Any, says: str) -> None:
    def ring(rank: Any, size: int) -> Iterator[Round]:
        right, left = (rank + 1) % size, (rank - 1) % size
        alone = [NONE] * size
        alone[0] = step.to if isinstance(step, Send) else step.source
        yield Round(Send(0, right), Receive(0, left), type(step)(0, np.array(alone)))

    with pytest.raises(ProgramError, match=says):
        simulate_collective(made(ring), 3, 3, NEAR)


def test_a_cluster_says_what_it_needs() -> None:
    described = {
        "hosts": 4,
        "ranks_per_host": 2,
        "same_host": {"alpha_s": 2.0, "beta_s_per_byte": 3.0, "gamma_s_per_byte": 5.0},
        "other_host": {"alpha_s": 100.0, "beta_s_per_byte": 7.0, "gamma_s_per_byte": 11.0},
    }
    assert Cluster.of(described) == Cluster(4, 2, NEAR, FAR)
    assert Cluster.of({**described, "rails": 2, "name": "x"}) == Cluster(4, 2, NEAR, FAR, 2, "x")
    for change, says in (
        ({"hosts": 0}, "needs hosts of at least 1, not 0"),
        ({"rail": 2}, "may have rails, name; it has .*rail,"),
        ({"same_host": {"alpha_s": 1.0}}, "cluster's same_host needs alpha_s, beta_s_per_byte"),
        ({"same_host": 3}, "it has nothing"),
        ({"other_host": {"alpha_s": -1.0, "beta_s_per_byte": 1.0}}, "Link needs alpha_s finite"),
    ):
        with pytest.raises(ConfigError, match=says):
            Cluster.of({**described, **change})
    ring = find("allreduce", "ring")
    with pytest.raises(ConfigError, match=r"room for 8 ranks \(4 hosts of 2\), not for 9"):
        simulate_collective(ring, 9, 1, Cluster.of(described))
    with pytest.raises(ConfigError, match="each of the 3 ranks a host below 4; .* hosts 1 to 4"):
        simulate_collective(ring, 3, 1, Cluster.of(described), hosts=(1, 2, 4))


# --- thousands of ranks -------------------------------------------------------------------------

SUPERCOMPUTER = Cluster(1024, 16, Link(1e-6, 1e-10, 5e-11), Link(3e-6, 4e-11, 5e-11), rails=4)


@pytest.mark.parametrize("name", ["recursive_doubling", "rabenseifner", "hierarchical"])
def test_sixteen_thousand_ranks_take_seconds(name: str) -> None:
    began = time.perf_counter()
    found = simulate_collective(find("allreduce", name), 16384, 1 << 30, SUPERCOMPUTER)
    assert time.perf_counter() - began < 60  # 10 on a quiet machine
    assert found > (1 << 30) * 4e-11


def test_a_ring_of_four_thousand_with_a_byte_too_many() -> None:
    """Chunk 0 has one byte more, and everybody waits for it in every round."""
    link, size = Link(1e-6, 1e-9), 4096
    found = simulate_collective(find("allreduce", "ring"), size, size * 1024 + 1, link)
    assert found == pytest.approx(2 * (size - 1) * 1e-6 + 2 * (size - 1) * 1025 * 1e-9, rel=1e-3)


def test_one_chunk_a_rank_is_cut_as_the_executor_cuts_it() -> None:
    def own(rank: Any, size: int) -> Iterator[Round]:
        yield Round(Send(rank, (rank + 1) % size), Receive((rank - 1) % size, (rank - 1) % size))

    for nbytes in range(12):
        longest = max(stop - start for start, stop in partition(nbytes, 5))
        found = simulate_collective(made(own, one_per_rank), 5, nbytes, Link(0.0, 1.0))
        assert found == longest
