"""Every message algorithm on every group size: proved, on numbers too, at the cost it says."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mpmp.errors import ConfigError, ProgramError
from mpmp.programs.check import CollectiveReport, check
from mpmp.programs.collectives import COLLECTIVES, find
from mpmp.programs.follow import follow_collective
from mpmp.programs.steps import NONE, Algorithm, Round, Send
from pure.oracle import (
    ALGORITHMS,
    assert_right,
    fact_sets,
    run,
    start_cells,
    whole_vectors,
)

slow = pytest.mark.slow
every_algorithm = pytest.mark.parametrize(("collective", "name"), ALGORITHMS)
LARGE = [33, 48, 64, 65, 100, 127, 128, 255, 256]
LARGEST = [pytest.param(size, marks=slow) for size in (511, 512, 1000)]


def prove(collective: str, name: str, size: int, roots: str = "some") -> None:
    algorithm = ALGORITHMS[collective, name]
    for facts in fact_sets(algorithm, size, roots):
        report, cost = check(collective, name, size, **facts), algorithm.cost(size, **facts)
        assert isinstance(report, CollectiveReport)
        assert (report.rounds, report.sent, report.reduced, report.received) == (
            cost.rounds,
            cost.sent,
            cost.reduced,
            cost.received,
        )


@every_algorithm
def test_every_algorithm_is_proved(collective: str, name: str) -> None:
    for size in range(1, 33):
        prove(collective, name, size, "all" if size <= 17 else "some")


@every_algorithm
@pytest.mark.parametrize("size", [*LARGE, *LARGEST])
def test_large_groups_are_proved(collective: str, name: str, size: int) -> None:
    prove(collective, name, size)


@every_algorithm
def test_a_thousand_ranks_are_proved(collective: str, name: str) -> None:
    facts = fact_sets(ALGORITHMS[collective, name], 1024)[-1]
    check(collective, name, 1024, **facts)


@every_algorithm
@pytest.mark.parametrize("size", [*range(1, 18), 31, 32, 33, 64])
def test_a_vector_of_ranks_follows_the_whole_group(collective: str, name: str, size: int) -> None:
    algorithm = ALGORITHMS[collective, name]
    for facts in fact_sets(algorithm, size):
        assert_same_program(algorithm, size, range(size), facts)


@every_algorithm
@pytest.mark.parametrize("size", [255, 256, pytest.param(1000, marks=slow)])
def test_a_large_vector_follows_some_of_its_ranks(collective: str, name: str, size: int) -> None:
    """The proofs of large groups stand on the vector: ranks by themselves do the same."""
    algorithm = ALGORITHMS[collective, name]
    facts = fact_sets(algorithm, size)[-1]
    assert_same_program(algorithm, size, (0, 1, size // 2, size - 1), facts)


def assert_same_program(algorithm: Algorithm, size: int, ranks: Any, facts: dict[str, Any]) -> None:
    vector = list(algorithm.program(np.arange(size), size, **facts))
    for rank in ranks:
        alone: list[Round] = list(algorithm.program(rank, size, **facts))
        assert len(alone) == len(vector)
        for number, (one, together) in enumerate(zip(alone, vector, strict=True)):
            assert [type(step) for step in one.steps] == [type(step) for step in together.steps]
            for mine, all_of_them in zip(one.steps, together.steps, strict=True):
                peer = "to" if isinstance(mine, Send) else "source"
                for word in ("chunk", "count", peer):
                    found = getattr(all_of_them, word)
                    expected = found if np.ndim(found) == 0 else found[rank]
                    assert getattr(mine, word) == expected, f"rank {rank}, round {number}: {mine}"


@every_algorithm
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6, 7, 8, 11, 16])
def test_numbers_come_out_right(collective: str, name: str, size: int) -> None:
    """Symbols and numbers agree, also where chunks are uneven or empty."""
    if collective == "barrier":
        return
    algorithm = ALGORITHMS[collective, name]
    for facts in fact_sets(algorithm, size, "all" if size <= 8 else "some"):
        for length in (0, 1, 3, 23):
            if name == "bruck" and collective == "alltoall":
                length *= size  # pieces of others pass through: equal counts only
            vectors = whole_vectors(size, length, seed=size)
            start = start_cells(collective, vectors, algorithm.num_chunks(size, **facts))
            end = run(algorithm, start, **facts)
            assert_right(collective, start, end, facts.get("root", 0))


def test_pairwise_takes_counts_that_differ_between_any_two_ranks() -> None:
    rng = np.random.default_rng(3)
    start = [[rng.integers(0, 99, rng.integers(0, 5)) for _ in range(5)] for _ in range(5)]
    for rank, chunks in enumerate(start):
        chunks.extend([chunks[rank]] * 5)
    assert_right("alltoall", start, run(ALGORITHMS["alltoall", "pairwise"], start))


def test_everybody_has_heard_of_everybody_after_a_barrier() -> None:
    for size in (1, 2, 3, 5, 8, 13):
        start = [[np.array(1 << rank)] for rank in range(size)]
        end = run(ALGORITHMS["barrier", "dissemination"], start, np.bitwise_or)
        assert {int(chunks[0]) for chunks in end} == {(1 << size) - 1}


# --- the order of sums --------------------------------------------------------------------------


def nested(lower: Any, higher: Any) -> Any:
    """No operation less kind: it tells order and nesting."""
    return np.array([f"({a}{b})" for a, b in zip(lower, higher, strict=True)], object)


@every_algorithm
@pytest.mark.parametrize("size", [2, 3, 4, 5, 6, 7, 8, 11, 13, 16])
def test_all_ranks_get_the_same_bits(collective: str, name: str, size: int) -> None:
    """Whatever is combined, and however it rounds: the terms are the same, letter by letter."""
    if collective != "allreduce":
        return
    algorithm = ALGORITHMS[collective, name]
    letters = np.array([chr(ord("a") + rank) for rank in range(size)], object)
    for facts in fact_sets(algorithm, size):
        num_chunks = algorithm.num_chunks(size, **facts)
        start = [[np.array([letter], object)] * num_chunks for letter in letters]
        end = run(algorithm, start, nested, **facts)
        for chunk in range(num_chunks):
            terms = {chunks[chunk][0] for chunks in end}
            assert len(terms) == 1
            if algorithm.fixed_order:
                assert terms.pop().replace(")", "").lstrip("(") == "".join(letters)


@pytest.mark.parametrize("collective", ["allreduce", "reduce_scatter"])
def test_direct_sums_as_one_rank_would(collective: str) -> None:
    for size in (2, 3, 5, 8):
        scale = 10.0 ** np.random.default_rng(1).integers(-8, 8, (size, 23))
        vectors = (np.random.default_rng(2).normal(size=(size, 23)) * scale).astype(np.float32)
        in_order = vectors[0]
        for vector in vectors[1:]:
            in_order = in_order + vector
        end = run(ALGORITHMS[collective, "direct"], start_cells(collective, vectors, size))
        for rank in range(size):
            mine = range(size) if collective == "allreduce" else [rank]
            for chunk in mine:
                wanted = np.array_split(in_order, size)[chunk]
                assert end[rank][chunk].tobytes() == wanted.tobytes()


def test_only_sums_in_rank_order_may_be_called_so() -> None:
    fixed = {key for key, algorithm in ALGORITHMS.items() if algorithm.fixed_order}
    assert fixed == {("allreduce", "direct"), ("reduce_scatter", "direct")}
    for name in ("ring", "recursive_doubling", "swing"):
        claimed = replace(ALGORITHMS["allreduce", name], fixed_order=True)
        with pytest.raises(ProgramError, match="combined otherwise than in the order of the ranks"):
            check("allreduce", claimed, 4)


# --- facts, names, sizes ------------------------------------------------------------------------


def test_facts_that_a_program_does_not_take() -> None:
    chain = ALGORITHMS["broadcast", "chain"]
    known = {"root": 2, "hosts": (0, 0, 1), "segments": 4}
    assert chain.taken(known) == {"root": 2, "segments": 4}
    with pytest.raises(ProgramError, match="takes no fact hosts; its facts: root, segments"):
        check("broadcast", "chain", 3, **known)
    with pytest.raises(ProgramError, match="speaks of 3 ranks and there are 4"):
        check("allreduce", "hierarchical", 4, hosts=(0, 0, 1))


def test_bytes_between_hosts() -> None:
    """16 ranks on 4 hosts: each sends 2 (h-1)/h n/m to other hosts, 12 times less than to all."""
    hosts = tuple(rank // 4 for rank in range(16))
    algorithm = ALGORITHMS["allreduce", "hierarchical"]
    crossing = np.zeros(16, int)
    for one in follow_collective(algorithm, 16, hosts=hosts):
        crosses = np.take(hosts, one.sender) != np.take(hosts, one.receiver)
        np.add.at(crossing, one.sender, one.count * crosses)
    assert set(crossing / algorithm.num_chunks(16, hosts=hosts)) == {2 * 3 / 4 / 4}


@pytest.mark.parametrize("name", ["rabenseifner", "hierarchical", "swing", "double_binary_tree"])
def test_sixteen_thousand_ranks_are_followed_at_once(name: str) -> None:
    algorithm, size = ALGORITHMS["allreduce", name], 16_384
    facts = algorithm.taken({"hosts": tuple(rank // 8 for rank in range(size))})
    before = time.perf_counter()
    rounds = sum(1 for _ in algorithm.program(np.arange(size), size, **facts))
    assert rounds == algorithm.cost(size, **facts).rounds == 28
    assert time.perf_counter() - before < 5


@pytest.mark.parametrize(
    ("collective", "name", "near"),
    [
        ("allreduce", "rign", "ring"),
        ("alreduce", "ring", "allreduce"),
        ("broadcast", "binomal", "binomial"),
    ],
)
def test_an_unknown_name_is_told_the_nearest(collective: str, name: str, near: str) -> None:
    with pytest.raises(ConfigError, match=f'did you mean "{near}"; known: .*{near}'):
        find(collective, name)


def test_every_collective_has_an_algorithm() -> None:
    assert list(COLLECTIVES) == [
        "allreduce",
        "reduce_scatter",
        "allgather",
        "broadcast",
        "reduce",
        "gather",
        "scatter",
        "alltoall",
        "barrier",
    ]


def test_steps_without_a_peer_are_no_messages() -> None:
    idle = sum(
        step.to == NONE
        for rank in range(6)
        for one in ALGORITHMS["broadcast", "binomial"].program(rank, 6)
        for step in one.steps
        if isinstance(step, Send)
    )
    assert idle == 6 * 3 - 5
