"""Window programs: proved at every size, at the cost they say; wrong ones are refused."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest

from mpmp.errors import ProgramError
from mpmp.programs.check_windows import check_window
from mpmp.programs.collectives.allgather_window import ALLGATHER_WINDOW
from mpmp.programs.collectives.allreduce_one_shot import ALLREDUCE_ONE_SHOT
from mpmp.programs.collectives.allreduce_two_shot import ALLREDUCE_TWO_SHOT
from mpmp.programs.collectives.allreduce_window import ALLREDUCE_WINDOW
from mpmp.programs.collectives.barrier_window import BARRIER_WINDOW
from mpmp.programs.collectives.broadcast_window import BROADCAST_WINDOW
from mpmp.programs.collectives.reduce_scatter_window import REDUCE_SCATTER_WINDOW
from mpmp.programs.steps import NONE
from mpmp.programs.windows import (
    ALL,
    RESULT,
    RESULT_AND_SLOT,
    Await,
    Combine,
    Load,
    Publish,
    WindowAlgorithm,
    WindowStep,
    members,
)

PROGRAMS = {
    "allreduce window": ALLREDUCE_WINDOW,
    "allreduce one_shot": ALLREDUCE_ONE_SHOT,
    "allreduce two_shot": ALLREDUCE_TWO_SHOT,
    "reduce_scatter window": REDUCE_SCATTER_WINDOW,
    "allgather window": ALLGATHER_WINDOW,
    "broadcast window": BROADCAST_WINDOW,
    "barrier window": BARRIER_WINDOW,
}
Steps = list[list[WindowStep]]
each = pytest.mark.parametrize("named", PROGRAMS)


def all_facts(named: str, size: int) -> list[dict[str, int]]:
    if "broadcast" in named:
        return [{"root": root} for root in range(size)]
    return [{"pieces": pieces} for pieces in (1, 2, 3)] if "shot" in named else [{}]


@each
def test_every_program_is_proved_at_its_cost(named: str) -> None:
    collective, algorithm = named.split()[0], PROGRAMS[named]
    for size in range(1, 33):
        facts = all_facts(named, size)
        few = [facts[0]] if "shot" in named and size % 11 else [facts[0], facts[-1]]
        for one in facts if size <= 6 else few:
            report, cost = (
                check_window(collective, algorithm, size, **one),
                algorithm.cost(size, **one),
            )
            assert (report.size, report.syncs) == (size, cost.syncs)
            assert (report.read, report.written) == (cost.read, cost.written)


@pytest.mark.parametrize("named", ["allreduce one_shot", "broadcast window", "barrier window"])
@pytest.mark.parametrize("size", [64, 128])
def test_large_groups_are_proved(named: str, size: int) -> None:
    check_window(named.split()[0], PROGRAMS[named], size)


def test_costs_are_those_of_the_papers() -> None:
    """Reading and writing n for an allreduce, whatever the size: written out."""
    for size in (1, 2, 7):
        report = check_window("allreduce", ALLREDUCE_WINDOW, size)
        assert (report.syncs, report.read, report.written) == (2, 1, 1)
        for pieces in (1, 5):  # one more than a sum of all reads, and writes: what is loaded
            report = check_window("allreduce", ALLREDUCE_ONE_SHOT, size, pieces=pieces)
            assert (report.syncs, report.read, report.written) == (pieces, size + 1, 2)
            report = check_window("allreduce", ALLREDUCE_TWO_SHOT, size, pieces=pieces)
            # Summed once, (p-1)/p loaded, as much copied; stored to the result and to one slot.
            read = 1 + 2 * Fraction(size - 1, size)
            assert (report.syncs, report.read, report.written) == (pieces + 1, read, 2)
        report = check_window("reduce_scatter", REDUCE_SCATTER_WINDOW, size)
        assert (report.syncs, report.read, report.written) == (2, 1, Fraction(1, size))
        report = check_window("allgather", ALLGATHER_WINDOW, size)
        assert report.read == report.written == Fraction(size - 1, size)


# --- what is refused ------------------------------------------------------------------------------


def steps_of(algorithm: WindowAlgorithm, size: int, **facts: int) -> Steps:
    return [list(algorithm.program(rank, size, **facts)) for rank in range(size)]


def standing(algorithm: WindowAlgorithm, steps: Steps) -> WindowAlgorithm:
    def program(rank: int, size: int, **facts: Any) -> Iterator[WindowStep]:
        assert size == len(steps)
        yield from steps[rank]

    return replace(algorithm, program=program)


def at(algorithm: WindowAlgorithm, rank: int, number: int, *other: WindowStep) -> WindowAlgorithm:
    """Four ranks, one step of one of which is something else, or more, or nothing."""
    steps = steps_of(algorithm, 4)
    steps[rank][number : number + 1] = other
    return standing(algorithm, steps)


def everywhere(algorithm: WindowAlgorithm, number: int, *other: WindowStep) -> WindowAlgorithm:
    steps = steps_of(algorithm, 4)
    for one in steps:
        one[number : number + 1] = other
    return standing(algorithm, steps)


@pytest.mark.parametrize(
    ("named", "changed", "message"),
    [
        pytest.param(
            "allreduce window", at(ALLREDUCE_WINDOW, 2, 3),
            r"rank 2, step 4 \(the end\): it has published 1 times and rank 0 2 times; "
            "every rank must publish equally often",
            id="publish dropped on one rank",
        ),
        pytest.param(
            "allreduce window", at(ALLREDUCE_WINDOW, 0, 1),
            "rank 0, step 1: every program begins with Publish and Await of ALL",
            id="first await dropped on one rank",
        ),
        pytest.param(
            "allreduce window", everywhere(ALLREDUCE_WINDOW, 4),
            "rank 3, the result of turn 0: chunk 0 holds chunk 0 of rank 3 and must hold",
            id="last await dropped",
        ),
        pytest.param(
            "reduce_scatter window", everywhere(REDUCE_SCATTER_WINDOW, 3),
            r"rank \d, .*: chunk \d of the window of rank \d is not ordered with rank \d",
            id="last publish dropped, so that its await is met too early",
        ),
        pytest.param(
            "allreduce window", at(ALLREDUCE_WINDOW, 3, 2),
            "rank 2, the result of turn 0: chunk 3 holds chunk 3 of rank 2 and must hold "
            r"chunk 3 of rank 0 \+ chunk 3 of rank 1",
            id="combine dropped",
        ),
        pytest.param(
            "allreduce window", at(ALLREDUCE_WINDOW, 1, 1, Await(2)),
            "rank 1, step 1: every program begins with Publish and Await of ALL",
            id="first await of one rank in place of all",
        ),
        pytest.param(
            "allreduce window", at(ALLREDUCE_WINDOW, 1, 4, Await(2)),
            r"rank 1, .*: chunk \d of the window of rank \d is not ordered with rank \d",
            id="last await of one rank in place of all",
        ),
        pytest.param(
            "allreduce window", at(ALLREDUCE_WINDOW, 1, 2, Combine(2, ALL, ALL)),
            r"step 2: .*: chunk 2 of the window of rank 0 is not ordered with rank 1, step 2",
            id="combine of another chunk",
        ),
        pytest.param(
            "allreduce window", at(ALLREDUCE_WINDOW, 1, 2, Combine(1, 1, ALL)),
            "rank 2, the result of turn 0: chunk 1 holds chunk 1 of rank 1 and must hold",
            id="combine of one source",
        ),
        pytest.param(
            "allreduce window", at(ALLREDUCE_WINDOW, 1, 2, Combine(1, ALL, 1)),
            "rank 2, the result of turn 0: chunk 1 holds chunk 1 of rank 2 and must hold",
            id="combine for one target",
        ),
        pytest.param(
            "allreduce window", everywhere(ALLREDUCE_WINDOW, 2, Combine(0, ALL, ALL, 4)),
            r"rank 0, step 2: .* is not ordered with rank 3, step 2",
            id="everybody sums everything in place",
        ),
        pytest.param(
            "allreduce window",
            everywhere(ALLREDUCE_WINDOW, 2, Combine(0, ALL, ALL), Combine(0, ALL, ALL)),
            r"rank \d, step",
            id="summed twice",
        ),
        pytest.param(
            "allgather window", at(ALLGATHER_WINDOW, 0, 2, Combine(1, 2, 0)),
            r"rank 2, step 4: .*chunk 1 of the window of rank 2 is not ordered with rank 0, step 2",
            id="copied from another rank",
        ),
        pytest.param(
            "allgather window", at(ALLGATHER_WINDOW, 0, 2, Combine(4, 1, 0)),
            "rank 0, step 2: .* speaks of ranks or chunks that are not among the 4 ranks and 4 ch",
            id="no such chunk",
        ),
        pytest.param(
            "allreduce one_shot", replace(ALLREDUCE_ONE_SHOT, slots=1),
            "is not ordered with", id="one slot where two are needed",
        ),
        pytest.param(
            "allreduce one_shot", everywhere(ALLREDUCE_ONE_SHOT, 0),
            "rank 3, the result of turn 0: chunk 0 holds chunk 0 of rank 3 and must hold",
            id="nothing loaded",
        ),
        pytest.param(
            "allreduce one_shot", everywhere(ALLREDUCE_ONE_SHOT, 3, Combine(0, ALL, ALL)),
            "rank 0, step 3: .* or of slots where there are none", id="summed into slots",
        ),
        pytest.param(
            "allreduce window", everywhere(ALLREDUCE_WINDOW, 2, Combine(0, ALL, RESULT_AND_SLOT)),
            "rank 0, step 2: .* or of slots where there are none", id="no slot to show a sum in",
        ),
        pytest.param(
            "allreduce two_shot", everywhere(ALLREDUCE_TWO_SHOT, 5, Combine(0, ALL, RESULT)),
            r"rank \d, the result of turn 0: chunk 0 holds", id="a sum that nobody is shown",
        ),
        pytest.param(
            "allreduce two_shot", everywhere(ALLREDUCE_TWO_SHOT, 5, Combine(0, ALL, RESULT, 2)),
            "rank 0, step 5: .* or of slots where there are none",
            id="two chunks of a slot in one step",
        ),
        pytest.param(
            "broadcast window", everywhere(BROADCAST_WINDOW, 3),
            "is not ordered with", id="nobody says that it has read",
        ),
        pytest.param(
            "barrier window", everywhere(BARRIER_WINDOW, 1, Await(0)),
            "rank 0, step 1: every program begins with Publish and Await of ALL",
            id="a barrier of one rank",
        ),
    ],
)  # fmt: skip
def test_a_wrong_program_is_refused(named: str, changed: WindowAlgorithm, message: str) -> None:
    with pytest.raises(ProgramError, match=message):
        check_window(named.split()[0], changed, 4)


@pytest.mark.parametrize("algorithm", [ALLREDUCE_ONE_SHOT, ALLREDUCE_TWO_SHOT])
@pytest.mark.parametrize("pieces", [2, 3, 4])
def test_many_pieces_need_two_slots_in_turns(algorithm: WindowAlgorithm, pieces: int) -> None:
    """With one, a piece is loaded over another that a slow rank still reads."""
    for size in (2, 3):
        check_window("allreduce", algorithm, size, pieces=pieces)
        with pytest.raises(ProgramError, match="is not ordered with"):
            check_window("allreduce", replace(algorithm, slots=1), size, pieces=pieces)


def test_what_has_become_a_result_is_not_loaded() -> None:
    """A result may lie where its input was: a piece that is summed twice is loaded too late."""
    late: list[WindowStep] = [
        *(Load(0), Publish(), Await(ALL), Combine(0, ALL, RESULT)),
        *(Load(0), Publish(), Await(ALL), Combine(0, ALL, RESULT)),
    ]
    with pytest.raises(ProgramError, match="the result of turn 0: chunk 0 holds 2 times chunk 0"):
        check_window("allreduce", standing(ALLREDUCE_ONE_SHOT, [late, late]), 2)


def test_unequal_publishing_waits_for_ever_and_is_refused() -> None:
    waiting = [Publish(), Await(ALL), Publish(), Await(ALL)]
    steps: Steps = [waiting, [Publish(), Await(ALL), Await(0)]]
    with pytest.raises(ProgramError, match="rank 1, step 3 .the end.: it has published 1 times"):
        check_window("barrier", standing(BARRIER_WINDOW, steps), 2)


def test_no_program_of_these_words_waits_in_a_circle() -> None:
    """Whoever has published least finds everybody as far as itself, so somebody can always go on.

    That is why Await has no number: chance makes programs, and none is refused for waiting.
    """
    for seed in range(300):
        chance = random.Random(seed)
        size, often = chance.randint(2, 4), chance.randint(1, 4)
        steps: Steps = []
        for _ in range(size):
            rest: list[WindowStep] = [Publish()] * often
            for _ in range(chance.randint(0, 5)):
                source = chance.choice([ALL, *range(size)])
                rest.insert(chance.randint(0, len(rest)), Await(source))
            steps.append([Publish(), Await(ALL), *rest])
        syncs = max(sum(isinstance(step, Await) for step in one) for one in steps)

        def cost(size: int, syncs: int = syncs) -> Any:
            return replace(BARRIER_WINDOW.cost(size), syncs=syncs)

        check_window("barrier", replace(standing(BARRIER_WINDOW, steps), cost=cost), size)


def test_nobody_awaits_before_it_has_published() -> None:
    """Rank 1 waits before it publishes what rank 0 waits for: base counts are those of the turn."""
    before: Steps = [[Publish(), Await(ALL)], [Await(ALL), Publish()]]
    with pytest.raises(ProgramError, match=r"rank \d, "):
        check_window("barrier", standing(BARRIER_WINDOW, before), 2)


@pytest.mark.parametrize(
    "steps",
    [
        pytest.param(
            [Publish(), Combine(0, 0, RESULT), Await(ALL)], id="combine before the first await"
        ),
        pytest.param(
            [Publish(), Publish(), Await(ALL)], id="published twice before the first await"
        ),
    ],
)
def test_the_meeting_comes_first(steps: list[WindowStep]) -> None:
    """Until all have met nobody knows where a window lies; those who differ part alike."""
    cost = BARRIER_WINDOW.cost
    one = WindowAlgorithm(BARRIER_WINDOW.program, BARRIER_WINDOW.num_chunks, cost)
    with pytest.raises(
        ProgramError, match="rank 0, step 1: every program begins with Publish and Await"
    ):
        check_window("barrier", standing(one, [steps]), 1)


@pytest.mark.parametrize("what", ["syncs", "read", "written"])
def test_another_cost_than_published_is_refused(what: str) -> None:
    def cost(size: int) -> Any:
        right = ALLREDUCE_WINDOW.cost(size)
        return replace(right, **{what: getattr(right, what) + 1})

    with pytest.raises(ProgramError, match=f"rank 0, the end: {what} is .* and the cost says"):
        check_window("allreduce", replace(ALLREDUCE_WINDOW, cost=cost), 3)


# --- every change of one step ---------------------------------------------------------------------


def changes(step: WindowStep, size: int, chunks: int) -> Iterator[tuple[str, list[WindowStep]]]:
    """(kind, what stands in its place) of everything a slip of the pen could make of a step."""
    yield "dropped", []
    yield "doubled", [step, step]
    if isinstance(step, Await):
        for source in (ALL, *range(size)):
            if source != step.source:
                yield "other source", [Await(source)]
    if isinstance(step, Load):
        for chunk in range(chunks):
            if chunk != step.chunk:
                yield "other chunk", [replace(step, chunk=chunk)]
    if isinstance(step, Combine) and step.store_to != NONE:
        for chunk in range(chunks):
            if chunk != step.chunk:
                yield "other chunk", [replace(step, chunk=chunk)]
        for rank in (ALL, *range(size)):
            if rank != step.sum_from:
                yield "other source", [replace(step, sum_from=rank)]
            if rank != step.store_to:
                yield "other target", [replace(step, store_to=rank)]
        for private in (RESULT, RESULT_AND_SLOT):
            if step.store_to != private:
                yield "other target", [replace(step, store_to=private)]


def mutants(
    algorithm: WindowAlgorithm, size: int, facts: dict[str, int]
) -> Iterator[tuple[str, Steps]]:
    right = steps_of(algorithm, size, **facts)
    chunks = algorithm.num_chunks(size, **facts)
    for rank, one in enumerate(right):
        for number, step in enumerate(one):
            for kind, other in changes(step, size, chunks):
                mutant = [*one[:number], *other, *one[number + 1 :]]
                yield f"{type(step).__name__} {kind}", [*right[:rank], mutant, *right[rank + 1 :]]
            if number + 1 < len(one):
                swapped = [*one[:number], one[number + 1], step, *one[number + 2 :]]
                yield "swapped", [*right[:rank], swapped, *right[rank + 1 :]]
    for number in range(min(map(len, right))):  # of all ranks alike
        yield "dropped everywhere", [[*one[:number], *one[number + 1 :]] for one in right]


Memory = dict[tuple[int, int, int], int]


def played(
    collective: str, algorithm: WindowAlgorithm, steps: Steps, facts: dict[str, int], seed: int
) -> bool:
    """Whether the mutant is right on numbers when chance orders the ranks' steps.

    Written out apart from the checker: every load and store stands for itself, ranks that must
    wait wait, and three turns are played with new inputs each.
    """
    size, turns, chance = len(steps), 3, random.Random(seed)
    chunks = algorithm.num_chunks(size, **facts)
    memory: Memory = {}
    private: Memory = {}
    published = [0] * size
    right = True

    def given(rank: int, chunk: int, turn: int) -> int:
        return 1000 ** (rank + 1) * (7 * chunk + turn + 1)

    def expected(rank: int, chunk: int, turn: int) -> int | None:
        if collective == "allgather":
            return given(chunk, chunk, turn)
        if collective == "broadcast":
            return given(facts["root"], chunk, turn)
        if collective == "reduce_scatter" and chunk != rank:
            return None
        return sum(given(other, chunk, turn) for other in range(size))

    in_place, slots = not algorithm.slots, max(algorithm.slots, 1)
    places = chunks if in_place else algorithm.num_chunks(size)  # of a slot
    begun = [0] * size

    def rank_of(rank: int) -> Iterator[None]:
        nonlocal right
        mine = 0
        for turn in range(turns):
            begun[rank] = turn + 1
            for chunk in range(chunks):
                (memory if in_place else private)[rank, 0, chunk] = given(rank, chunk, turn)
                yield
            for step in steps[rank]:
                if isinstance(step, Publish):
                    published[rank] += 1
                    mine += 1
                    yield
                elif isinstance(step, Await):
                    for source in members(step.source, size):
                        while published[source] < mine:
                            yield
                elif isinstance(step, Load):
                    place = rank, mine % slots, step.chunk % places
                    memory[place] = private[rank, 0, step.chunk]
                    yield
                elif step.store_to != NONE:
                    total = 0
                    for source in members(step.sum_from, size):
                        if in_place:
                            total += memory[source, 0, step.chunk]
                        elif source == rank:
                            total += private[rank, 0, step.chunk]
                        else:
                            place = source, (mine - 1) % slots, step.chunk % places
                            total += memory.get(place, 0)
                        yield
                    if not in_place:
                        private[rank, 0, step.chunk] = total
                        if step.store_to == RESULT_AND_SLOT:
                            memory[rank, mine % slots, step.chunk % places] = total
                            yield
                    else:
                        for target in members(step.store_to, size):
                            memory[target, 0, step.chunk] = total
                            yield
            if collective == "barrier":
                right &= min(begun) > turn
                continue
            for chunk in range(chunks):
                wanted = expected(rank, chunk, turn)
                found = (memory if in_place else private).get((rank, 0, chunk))
                right &= wanted is None or found == wanted

    ranks = {rank: rank_of(rank) for rank in range(size)}
    # A rank that is chosen goes on for a while: others fall far behind.
    for _ in range(20_000):
        if not ranks:
            return right
        rank = chance.choice(sorted(ranks))
        for _ in range(chance.choice((1, 1, 2, 5, 40))):
            if next(ranks[rank], 0) == 0:
                del ranks[rank]
                break
    return False  # it waits for ever


def survivors(named: str, sizes: tuple[int, ...], planted: Counter[str]) -> Counter[str]:
    """Kinds of the mutants that the checker lets pass; none of them may be wrong on numbers."""
    collective, algorithm = named.split()[0], PROGRAMS[named]
    passed: Counter[str] = Counter()
    for size in sizes:
        for facts in all_facts(named, size):
            for kind, steps in mutants(algorithm, size, facts):
                planted[kind] += 1
                try:
                    check_window(collective, standing(algorithm, steps), size, **facts)
                except ProgramError as error:
                    assert re.match(r"rank \d+, (step \d+|the (input|result|end))", str(error))
                    continue
                passed[kind] += 1
                for seed in range(20):
                    assert played(collective, algorithm, steps, facts, seed), (size, kind, steps)
    return passed


HARMLESS = {
    "allreduce window": {"Await other source"},  # of two ranks, ALL is the other one
    # What is loaded before or after a sum of the other slot is the same.
    "allreduce one_shot": {"Await other source", "swapped"},
    "allreduce two_shot": {"Await other source", "swapped"},  # between two waits, in any order
    "reduce_scatter window": {"Await other source"},
    "allgather window": {"Await other source", "swapped"},  # copies in another order
    "broadcast window": {
        # Who is not the root may go when it has its copy: nobody reads its window.
        "Await other source",
        "Await dropped",
        "swapped",
        # The root's own copy is none.
        "Combine dropped",
        "Combine doubled",
    },
    "barrier window": set[str](),
}
"""Changes after which the program is right all the same, and costs the same."""


@each
def test_every_change_of_one_step_is_caught_or_harmless(named: str) -> None:
    planted: Counter[str] = Counter()
    # The documentation's table has two-shot on 4 ranks, too: most of all mutants.
    passed = survivors(named, (2, 3) if "two_shot" in named else (2, 3, 4), planted)
    assert planted["Publish dropped"] and planted["Await dropped"] and planted["swapped"]
    assert set(passed) == HARMLESS[named], passed


@each
def test_the_programs_themselves_are_right_on_numbers(named: str) -> None:
    """The player that judges mutants finds nothing wrong with what is right."""
    collective, algorithm = named.split()[0], PROGRAMS[named]
    for size in (1, 2, 3, 4):
        for facts in all_facts(named, size):
            for seed in range(20):
                steps = steps_of(algorithm, size, **facts)
                assert played(collective, algorithm, steps, facts, seed)


def test_the_player_notices_a_race() -> None:
    """And what the checker refuses as unordered goes wrong on numbers, in some order."""
    racing: list[Callable[[], WindowAlgorithm]] = [
        lambda: everywhere(ALLREDUCE_WINDOW, 4),
        lambda: replace(ALLREDUCE_ONE_SHOT, slots=1),
        lambda: everywhere(ALLGATHER_WINDOW, 6),
    ]
    for make, collective in zip(racing, ("allreduce", "allreduce", "allgather"), strict=True):
        algorithm = make()
        steps = steps_of(algorithm, 4)
        assert not all(played(collective, algorithm, steps, {}, seed) for seed in range(50))
