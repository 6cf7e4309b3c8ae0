"""Every algorithm of the table on every group size: proved, on numbers too, at published cost."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from math import log2
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mpmp.errors import ConfigError
from mpmp.programs.check import check
from mpmp.programs.collectives import COLLECTIVES, find
from mpmp.programs.follow import follow_collective
from mpmp.programs.partition import partition
from mpmp.programs.simulate import Link, simulate_collective
from mpmp.programs.steps import NONE, Algorithm, Cost, Reduce, Send

SIZES = [*range(1, 34), 64, 100]
POWERS = [1, 2, 4, 8, 16, 32, 64, 128]
ALL = [(collective, name) for collective, table in COLLECTIVES.items() for name in table]
every_algorithm = pytest.mark.parametrize(("collective", "name"), ALL)


@every_algorithm
@pytest.mark.parametrize("size", SIZES)
def test_every_algorithm_is_proved(collective: str, name: str, size: int) -> None:
    report = check(collective, name, size)
    cost = find(collective, name).cost(size)
    assert (report.rounds, report.sent, report.reduced) == (cost.rounds, cost.sent, cost.reduced)


@pytest.mark.parametrize(
    ("size", "root"), [(size, root) for size in range(1, 18) for root in range(size)]
)
def test_broadcast_is_proved_for_every_root(size: int, root: int) -> None:
    assert check("broadcast", "binomial", size, root=root).messages == size - 1


@every_algorithm
@pytest.mark.parametrize("size", SIZES)
def test_a_vector_of_ranks_follows_the_whole_group(collective: str, name: str, size: int) -> None:
    program = find(collective, name).program
    vector = list(program(np.arange(size), size))
    one_by_one = [list(program(rank, size)) for rank in range(size)]
    assert all(len(rounds) == len(vector) for rounds in one_by_one)
    for number, together in enumerate(vector):
        for place, step in enumerate(together.steps):
            steps = [rounds[number].steps[place] for rounds in one_by_one]
            assert {type(one) for one in steps} == {type(step)}
            for word in ("chunk", "count", "to" if isinstance(step, Send) else "source"):
                expected = [getattr(one, word) for one in steps]
                np.testing.assert_array_equal(
                    np.broadcast_to(getattr(step, word), size), expected, f"{word}, round {number}"
                )


def run(algorithm: Algorithm, buffers: NDArray[Any], **facts: Any) -> NDArray[Any]:
    """The buffers [rank, element] after the program, on numbers and in one process."""
    size, length = buffers.shape
    bounds = partition(length, algorithm.num_chunks(size))
    buffers = buffers.copy()
    for messages in follow_collective(algorithm, size, **facts):
        before = buffers.copy()
        for message in messages:
            spans = []
            for step in (message.send, message.put):
                spans.append(slice(bounds[step.chunk][0], bounds[step.chunk + step.count - 1][1]))
            payload = before[message.sender, spans[0]]
            if isinstance(message.put, Reduce):
                payload = payload + buffers[message.receiver, spans[1]]
            buffers[message.receiver, spans[1]] = payload
    return buffers


@every_algorithm
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6, 7, 8, 11, 16])
@pytest.mark.parametrize("length", [0, 1, 3, 23])
def test_numbers_come_out_right(collective: str, name: str, size: int, length: int) -> None:
    """Symbols and numbers agree, also where chunks are uneven or empty."""
    start = np.random.default_rng(size).integers(0, 1 << 40, (size, length))
    found = run(find(collective, name), start)
    if collective == "broadcast":
        assert (found == start[0]).all()
    elif collective == "allreduce":
        assert (found == start.sum(0)).all()
    else:
        for rank, (first, stop) in enumerate(partition(length, size)):
            if collective == "reduce_scatter":
                assert (found[rank, first:stop] == start.sum(0)[first:stop]).all()
            else:
                assert (found[:, first:stop] == start[rank, first:stop]).all()


# Thakur, Rabenseifner, Gropp 2005, as in the comments of MPICH: alpha, n beta and n gamma times.
PUBLISHED: dict[tuple[str, str], Callable[[int], tuple[int, Fraction | int, Fraction | int]]] = {
    ("allreduce", "ring"): lambda p: (2 * (p - 1), Fraction(2 * (p - 1), p), Fraction(p - 1, p)),
    ("allreduce", "recursive_doubling"): lambda p: (lg(p), lg(p), lg(p)),
    ("reduce_scatter", "ring"): lambda p: (p - 1, Fraction(p - 1, p), Fraction(p - 1, p)),
    ("reduce_scatter", "recursive_halving"): lambda p: (
        lg(p),
        Fraction(p - 1, p),
        Fraction(p - 1, p),
    ),
    ("allgather", "ring"): lambda p: (p - 1, Fraction(p - 1, p), 0),
    ("allgather", "recursive_doubling"): lambda p: (lg(p), Fraction(p - 1, p), 0),
    ("broadcast", "binomial"): lambda p: (lg(p), lg(p), 0),
}


def lg(size: int) -> int:
    return int(log2(size))


@every_algorithm
@pytest.mark.parametrize("size", POWERS)
def test_published_costs_hold(collective: str, name: str, size: int) -> None:
    rounds, sent, reduced = PUBLISHED[collective, name](size)
    assert find(collective, name).cost(size) == Cost(rounds, Fraction(sent), Fraction(reduced))


@every_algorithm
@pytest.mark.parametrize("size", POWERS)
def test_simulated_time_is_the_published_one(collective: str, name: str, size: int) -> None:
    link, nbytes = Link(alpha_s=2e-6, beta_s_per_byte=3e-10, gamma_s_per_byte=7e-11), 1 << 22
    rounds, sent, reduced = PUBLISHED[collective, name](size)
    published = rounds * link.alpha_s + nbytes * (
        float(sent) * link.beta_s_per_byte + float(reduced) * link.gamma_s_per_byte
    )
    found = simulate_collective(find(collective, name), size, nbytes, link)
    assert found == pytest.approx(published, rel=1e-12)


@every_algorithm
@pytest.mark.parametrize("size", [3, 6, 7, 12, 33])
def test_simulated_time_of_other_sizes(collective: str, name: str, size: int) -> None:
    """Without a cost a byte every round takes alpha; with bytes no rank beats what it must send."""
    algorithm = find(collective, name)
    cost = algorithm.cost(size)
    assert simulate_collective(algorithm, size, 1000, Link(1.0, 0.0)) == cost.rounds
    nbytes = 1001 * size
    assert simulate_collective(algorithm, size, nbytes, Link(0.0, 1.0)) >= cost.sent * nbytes


def test_uneven_chunks_wait_for_the_longest() -> None:
    """Seven bytes on three ranks are 3 + 2 + 2, and in each of four rounds somebody sends the 3."""
    assert simulate_collective(find("allreduce", "ring"), 3, 7, Link(0.0, 1.0)) == 12
    assert simulate_collective(find("allreduce", "ring"), 3, 0, Link(1.0, 1.0)) == 4


def test_thousands_of_ranks_are_simulated_at_once() -> None:
    found = simulate_collective(find("allreduce", "ring"), 4096, 1 << 24, Link(1e-6, 1e-9))
    assert found == pytest.approx(2 * 4095 * (1e-6 + (1 << 12) * 1e-9), rel=1e-9)


@pytest.mark.parametrize(
    ("collective", "name", "near"),
    [
        ("allreduce", "rign", "ring"),
        ("alreduce", "ring", "allreduce"),
        ("broadcast", "", "binomial"),
    ],
)
def test_an_unknown_name_is_told_the_nearest(collective: str, name: str, near: str) -> None:
    with pytest.raises(ConfigError, match=f'did you mean "{near}"; known: .*{near}'):
        find(collective, name)


def test_steps_without_a_peer_are_no_messages() -> None:
    idle = sum(
        step.to == NONE
        for rank in range(6)
        for one in find("broadcast", "binomial").program(rank, 6)
        for step in one.steps
        if isinstance(step, Send)
    )
    assert idle == 6 * 3 - 5
