"""Programs that are wrong are refused, with the rank, the round and the reason in one sentence."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest

from mpmp.errors import ConfigError, ProgramError
from mpmp.programs.check import check
from mpmp.programs.collectives import find
from mpmp.programs.follow import follow_collective
from mpmp.programs.simulate import Link, simulate_collective
from mpmp.programs.steps import (
    Algorithm,
    Cost,
    Ranks,
    Receive,
    Reduce,
    Round,
    Send,
    one_per_rank,
    whole,
)
from mpmp.programs.windows import WindowAlgorithm
from pure.mutants import plant
from pure.oracle import ALGORITHMS

RING = find("allreduce", "ring")
DOUBLING = find("allreduce", "recursive_doubling")
HALVING = find("reduce_scatter", "recursive_halving")
Change = Callable[[int, int, Round], Round | None]


def changed(algorithm: Algorithm, change: Change) -> Algorithm:
    """The algorithm with ``change(rank, number, round)`` in place of its rounds; None drops one."""

    def changed_program(rank: int, size: int, **facts: Any) -> Iterator[Round]:
        for number, one in enumerate(algorithm.program(rank, size, **facts)):
            other = change(rank, number, one)
            if other is not None:
                yield other

    return replace(algorithm, program=changed_program)


def at(rank: int | None, number: int, other: Callable[[Round], Round | None]) -> Change:
    """``other`` in one round, of one rank or of all."""
    return lambda r, n, one: other(one) if n == number and rank in (None, r) else one


def step(place: int, **words: Any) -> Callable[[Round], Round]:
    """The round with other words in one of its steps."""

    def other(one: Round) -> Round:
        steps = list(one.steps)
        steps[place] = replace(steps[place], **words)
        return Round(*steps)

    return other


def receive_in_place_of_reduce(one: Round) -> Round:
    return Round(*(Receive(s.chunk, s.source) if isinstance(s, Reduce) else s for s in one.steps))


def reduce_in_place_of_receive(one: Round) -> Round:
    return Round(*(Reduce(s.chunk, s.source) if isinstance(s, Receive) else s for s in one.steps))


@pytest.mark.parametrize(
    ("algorithm", "change", "message"),
    [
        pytest.param(
            RING, at(2, 3, lambda one: None), "rank 2, round 5: the program has 5 rounds here",
            id="round dropped on one rank",
        ),
        pytest.param(
            RING, at(None, 2, lambda one: None),
            "rank 0, round 2: chunk 0 is written last and ends without what rank 0 gave, "
            "which must be in it exactly once",
            id="round dropped on all ranks",
        ),
        pytest.param(
            RING, at(0, 1, step(0, to=2)),
            r"rank 0, round 1: Send\(chunk=3, to=2, count=1\) waits for ever, because rank 2 "
            "receives nothing that fits in that round; ranks 0 -> 2 -> 1 -> 0 wait",
            id="send to another peer",
        ),
        pytest.param(
            RING, at(3, 0, step(1, source=1)),
            "rank 2, round 0: Send.* waits for ever, because rank 3 receives nothing that fits",
            id="reduce from another peer",
        ),
        pytest.param(
            RING, at(1, 2, step(0, chunk=2)), "rank 0, round 4: chunk 3 is written last and ends",
            id="another chunk sent",
        ),
        pytest.param(
            RING, at(1, 2, receive_in_place_of_reduce),
            r"rank 0, round \d: chunk 2 is written last and ends without what rank 1 gave",
            id="copied and not summed",
        ),
        pytest.param(
            RING, at(1, 3, reduce_in_place_of_receive),
            "rank 1, round 3: chunk 1 is written last and ends more than once with what rank 1 "
            "gave, which must be in it exactly once",
            id="summed twice",
        ),
        pytest.param(
            RING, at(1, 0, lambda one: Round(*one.steps, Receive(0, 0))),
            r"rank 1, round 0: Receive\(chunk=0, .*\) and Reduce.* overlap in chunk 0",
            id="two writes of one chunk",
        ),
        pytest.param(
            HALVING, at(0, 0, lambda one: Round(*one.steps, Receive(1, 1, 2))),
            r"rank 0, round 0: Receive\(chunk=1, .*\) and Reduce.* overlap in chunk 1",
            id="spans that overlap",
        ),
        pytest.param(
            HALVING, at(0, 0, lambda one: Round(*one.steps, Reduce(1, 2))),
            "rank 0, round 0: Reduce.* and Reduce.* combine one rank's twice in chunk 1",
            id="one rank's combined twice",
        ),
        pytest.param(
            RING, at(0, 2, lambda one: Round(*one.steps, Send(0, 1))),
            r"rank 1, round 2: Reduce\(chunk=2, .*\) is one of 1 steps that take a message from "
            "rank 0, which sends it in 2", id="messages of different steps",
        ),
        pytest.param(
            HALVING, at(0, 0, step(0, count=1)),
            r"rank 2, round 0: Reduce\(chunk=2, source=0, count=2\) meets "
            r"Send\(chunk=2, to=2, count=1\), whose count is another",
            id="lengths that differ",
        ),
        pytest.param(
            RING, at(0, 0, step(0, to=0)), "rank 0, round 0: .* not another rank", id="to itself",
        ),
        pytest.param(
            RING, at(0, 0, step(0, to=4)), "rank 0, round 0: .* not another rank", id="no rank",
        ),
        pytest.param(
            RING, at(2, 4, step(0, chunk=4)), "rank 2, round 4: .* not lie within the 4 chunks",
            id="no such chunk",
        ),
        pytest.param(
            HALVING, at(3, 1, step(1, count=0)), "rank 3, round 1: .* not lie", id="no chunk",
        ),
        pytest.param(
            DOUBLING, lambda rank, number, one: one if rank in (1, 3) else Round(),
            "rank 1, round 0: Send.* waits for ever, because rank 0 receives nothing",
            id="peers that do nothing",
        ),
        pytest.param(
            replace(RING, cost=lambda size: Cost(6, Fraction(1), Fraction(3, 4))),
            at(0, 9, step(0)),
            r"rank 0, round 6 \(the end\): it has sent 3/2 n, the most of all, .* says 1 n",
            id="more bytes than published",
        ),
        pytest.param(
            replace(RING, cost=lambda size: Cost(6, Fraction(3, 2), Fraction(1))),
            at(0, 9, step(0)), "rank 0, round 6 .* has reduced 3/4 n, .* says 1 n",
            id="fewer reduced than published",
        ),
        pytest.param(
            replace(RING, cost=lambda size: Cost(5, Fraction(3, 2), Fraction(3, 4))),
            at(0, 9, step(0)), "rank 0, round 6: the program ends here and its cost says 5 rounds",
            id="more rounds than published",
        ),
    ],
)  # fmt: skip
def test_a_broken_program_is_refused(algorithm: Algorithm, change: Change, message: str) -> None:
    collective = "reduce_scatter" if algorithm is HALVING else "allreduce"
    with pytest.raises(ProgramError, match=f"^changed_program on 4 ranks: .*{message}"):
        check(collective, changed(algorithm, change), 4)


@pytest.mark.parametrize("size", [2, 3, 4, 5, pytest.param(6, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("collective", "name"), ALGORITHMS)
def test_no_step_can_be_changed_unseen(collective: str, name: str, size: int) -> None:
    """Every single change of every round and every step of every rank is found."""
    harmless: list[str] = []
    plant(collective, name, size, lambda kind, caught: None if caught else harmless.append(kind))
    if (collective, name) == ("broadcast", "scatter_allgather"):
        # A chunk that the scatter has already brought may come from another place once more.
        assert len(harmless) <= 4
    else:
        assert not harmless


def test_a_cyclic_wait_is_found() -> None:
    """Everybody receives first and sends after: MPI would hang, whatever the size."""

    def receive_then_send(rank: Ranks, size: int) -> Iterator[Round]:
        yield Round(Receive((rank - 1) % size, source=(rank - 1) % size))
        yield Round(Send(rank, to=(rank + 1) % size))

    algorithm = Algorithm(receive_then_send, one_per_rank, lambda size: Cost(2, Fraction(1, size)))
    with pytest.raises(ProgramError, match=r"rank 0, round 0: .* ranks 0 -> 2 -> 1 -> 0 wait"):
        check("allgather", algorithm, 3)


def test_rounds_of_different_number_must_not_meet() -> None:
    def late(rank: Ranks, size: int) -> Iterator[Round]:
        yield Round(Send(0, to=1)) if rank == 0 else Round()
        yield Round(Receive(0, source=0)) if rank == 1 else Round()

    algorithm = Algorithm(late, whole, lambda size: Cost(2, Fraction(1)))
    with pytest.raises(
        ProgramError, match=r"rank 1, round 1: .* rank 0 sends in round 0; rounds of"
    ):
        check("broadcast", algorithm, 2)


def test_messages_between_two_ranks_meet_in_order() -> None:
    """Both halves in one round, listed the other way round at the receiver: they are exchanged."""

    def halves(rank: Ranks, size: int, *, order: tuple[int, int] = (0, 1)) -> Iterator[Round]:
        first, second = order
        yield (
            Round(Send(0, 1), Send(1, 1))
            if rank == 0
            else Round(Receive(first, 0), Receive(second, 0))
        )

    algorithm = Algorithm(
        halves, lambda size, order=(): 2, lambda size, order=(): Cost(1, Fraction(1)), ("order",)
    )
    assert check("broadcast", algorithm, 2).messages == 1
    with pytest.raises(
        ProgramError, match="rank 1, round 0: chunk 0 is written last and ends as chunk 1 of"
    ):
        check("broadcast", algorithm, 2, order=(1, 0))


def test_a_program_may_use_what_it_received_only_in_the_next_round() -> None:
    """All sends read the buffer as the round began: a chain in one round moves old data."""

    def chain(rank: Ranks, size: int) -> Iterator[Round]:
        to, source = (rank + 1, rank - 1)
        yield Round(*[Send(0, to)] * (to < size), *[Receive(0, source)] * (source >= 0))

    algorithm = Algorithm(chain, whole, lambda size: Cost(1, Fraction(1)))
    assert check("broadcast", algorithm, 2).rounds == 1
    with pytest.raises(ProgramError, match=r"rank 2, round 0: .* without what rank 0 gave"):
        check("broadcast", algorithm, 3)


def star(*, twice: bool = False) -> Algorithm:
    """Everybody gives its vector to rank 0 in one round, and gets the sum back."""

    def program(rank: Ranks, size: int) -> Iterator[Round]:
        others = range(1, size)
        if rank == 0:
            yield Round(*(Reduce(0, other) for other in (*others, *others[:twice])))
            yield Round(*(Send(0, other) for other in others))
        else:
            yield Round(Send(0, 0), *[Send(0, 0)] * (twice and rank == 1))
            yield Round(Receive(0, 0))

    return Algorithm(
        program, whole, lambda size: Cost(2, *(Fraction(size - 1),) * 2, Fraction(size - 1))
    )


def test_a_round_may_combine_what_several_ranks_sent() -> None:
    report = check("allreduce", star(), 4)
    assert (report.messages, report.reduced, report.chain) == (6, 3, 2)
    with pytest.raises(ProgramError, match="rank 0, round 0: .* combine one rank's twice in chunk"):
        check("allreduce", star(twice=True), 4)
    # Rank 0 stands first, then the others in their order: the same as one rank after the other.
    assert check("allreduce", replace(star(), fixed_order=True), 5).rounds == 2


def test_an_order_that_differs_between_ranks_is_refused() -> None:

    def doubling(rank: Ranks, size: int) -> Iterator[Round]:
        for partner in (rank ^ 1, rank ^ 2):
            yield Round(Send(0, partner), Reduce(0, partner))

    cost = Cost(2, Fraction(2), Fraction(2))
    assert check("allreduce", Algorithm(doubling, whole, lambda size: cost), 4).rounds == 2

    def moved(rank: Ranks, size: int) -> Iterator[Round]:
        """Pairs 0-3 and 1-2, then 0-1 and 3-2: rank 3's pair comes second here and first there."""
        for partner in ([3, 2, 1, 0][rank], [1, 0, 3, 2][rank]):
            yield Round(Send(0, partner), Reduce(0, partner))

    with pytest.raises(
        ProgramError,
        match="rank 2, round 1: chunk 0 is written last and ends combined otherwise than as on "
        "rank 0, and so with other bits",
    ):
        check("allreduce", Algorithm(moved, whole, lambda size: cost), 4)


def test_a_program_that_branches_on_its_rank_is_proved_on_any_size() -> None:
    """It takes no vector of ranks, and so every rank's program is run by itself."""
    assert check("allreduce", star(), 100).rounds == 2


def test_a_window_program_has_no_messages() -> None:
    window = WindowAlgorithm(lambda rank, size: iter(()), whole, lambda size: None)
    with pytest.raises(ProgramError, match="sends no messages; only a program of rounds can be"):
        follow_collective(window, 2)


def test_a_collective_that_needs_a_chunk_a_rank_says_so() -> None:
    with pytest.raises(
        ProgramError, match="1 chunks and the collective needs one for each of the 2"
    ):
        check("allgather", find("broadcast", "binomial"), 2)


def test_an_unknown_collective_is_refused() -> None:
    with pytest.raises(ConfigError, match='did you mean "allreduce"'):
        check("all_reduce", "ring", 2)


def test_the_simulator_refuses_a_message_without_partner() -> None:
    broken = changed(RING, lambda rank, number, one: Round(*one.steps[: 2 - (number == 1)]))
    with pytest.raises(
        ProgramError, match="rank 0, round 1: sends to rank 1, which has no partner"
    ):
        simulate_collective(broken, 4, 64, Link(1.0, 1.0))
