"""Planted bugs: every algorithm changed in one place, and how many of the changes are refused.

    python tests/pure/mutants.py        writes the table for the documentation, from its top folder

A mutant is *caught* when the checker refuses it with rank, round and reason. What is not caught
must be *harmless*: on numbers the result is right all the same, and no cost is another.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import numpy as np

from mpmp.errors import ProgramError
from mpmp.programs.check import check
from mpmp.programs.steps import NONE, Algorithm, Receive, Reduce, Round, Send, Step
from pure.oracle import ALGORITHMS, assert_right, fact_sets, run, start_cells, whole_vectors

Programs = list[list[Round]]
KINDS = (
    "dropped round",
    "dropped step",
    "swapped peer",
    "shifted chunk",
    "other kind",
    "doubled reduction",
    "cyclic wait",
)


def programs_of(algorithm: Algorithm, size: int, facts: dict[str, Any]) -> Programs:
    return [list(algorithm.program(rank, size, **facts)) for rank in range(size)]


def standing(algorithm: Algorithm, programs: Programs) -> Algorithm:
    """The algorithm with these rounds for its program, as long as groups are that large."""

    def changed_program(rank: int, size: int, **facts: Any) -> Iterator[Round]:
        assert size == len(programs)
        yield from programs[rank]

    return replace(algorithm, program=changed_program)


def peer_of(step: Step) -> int:
    peer: int = step.to if isinstance(step, Send) else step.source
    return peer


def step_mutants(one: Round, rank: int, size: int, num_chunks: int) -> Iterator[tuple[str, Round]]:
    """The round with one of its steps left out, misdirected, shifted, or of the other kind."""
    steps = one.steps
    for place, old in enumerate(steps):
        if peer_of(old) == NONE:
            continue

        def other(new: Step, place: int = place) -> Round:
            return Round(*steps[:place], new, *steps[place + 1 :])

        word = "to" if isinstance(old, Send) else "source"
        yield "dropped step", other(replace(old, **{word: NONE}))
        for peer in range(size):
            if peer not in (rank, peer_of(old)):
                yield "swapped peer", other(replace(old, **{word: peer}))
        if num_chunks > old.count:
            shifted = (old.chunk + 1) % (num_chunks - old.count + 1)
            yield "shifted chunk", other(replace(old, chunk=shifted))
        if isinstance(old, Receive):
            yield "doubled reduction", other(Reduce(old.chunk, old.source, old.count))
        elif isinstance(old, Reduce):
            yield "other kind", other(Receive(old.chunk, old.source, old.count))


def mutants(algorithm: Algorithm, size: int, facts: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """(kind, programs) of everything that is changed."""
    programs = programs_of(algorithm, size, facts)
    num_chunks = algorithm.num_chunks(size, **facts)
    for number in range(len(programs[0])):
        yield "dropped round", [[*one[:number], *one[number + 1 :]] for one in programs]
        yield "cyclic wait", [_receives_first(one, number) for one in programs]
        if any(isinstance(step, Reduce) for one in programs for step in one[number].steps):
            yield "doubled reduction", [[*one[: number + 1], *one[number:]] for one in programs]
    for rank, rounds in enumerate(programs):
        for number, one in enumerate(rounds):
            dropped = [*rounds[:number], *rounds[number + 1 :]]
            yield "dropped round", [*programs[:rank], dropped, *programs[rank + 1 :]]
            for kind, mutant in step_mutants(one, rank, size, num_chunks):
                changed = [*rounds[:number], mutant, *rounds[number + 1 :]]
                yield kind, [*programs[:rank], changed, *programs[rank + 1 :]]


def _receives_first(rounds: list[Round], number: int) -> list[Round]:
    """The rank waits for what it receives in a round before it begins to send."""
    sends = [step for step in rounds[number].steps if isinstance(step, Send)]
    puts = [step for step in rounds[number].steps if not isinstance(step, Send)]
    return [*rounds[:number], Round(*puts), Round(*sends), *rounds[number + 1 :]]


def refusal(collective: str, algorithm: Algorithm, programs: Programs, **facts: Any) -> str | None:
    """What the checker says; None where it accepts the mutant."""
    try:
        check(collective, standing(algorithm, programs), len(programs), **facts)
    except ProgramError as error:
        assert re.search(r"rank \d+, round \d+", str(error)), error
        return str(error)
    return None


def assert_harmless(
    collective: str, algorithm: Algorithm, programs: Programs, **facts: Any
) -> None:
    """What was accepted is right on numbers."""
    size, mutant = len(programs), standing(algorithm, programs)
    if collective == "barrier":
        start = [[np.array(1 << rank)] for rank in range(size)]
        end = run(mutant, start, np.bitwise_or)
        assert {int(chunks[0]) for chunks in end} == {(1 << size) - 1}
        return
    num_chunks = algorithm.num_chunks(size, **facts)
    start = start_cells(collective, whole_vectors(size, 2 * num_chunks), num_chunks)
    assert_right(collective, start, run(mutant, start, **facts), facts.get("root", 0))


Found = Callable[[str, bool], None]


def plant(collective: str, name: str, size: int, found: Found) -> None:
    """Every mutant of an algorithm with all its facts; ``found(kind, caught)`` hears of each."""
    algorithm = ALGORITHMS[collective, name]
    for facts in fact_sets(algorithm, size):
        for kind, programs in mutants(algorithm, size, facts):
            caught = refusal(collective, algorithm, programs, **facts) is not None
            if not caught:
                assert_harmless(collective, algorithm, programs, **facts)
            found(kind, caught)


def table(sizes: list[int]) -> str:
    """Mutants planted and caught, one line an algorithm, as markdown."""
    lines = [
        f"| algorithm | {' | '.join(KINDS)} | planted | caught | harmless |",
        f"|---|{'---:|' * (len(KINDS) + 3)}",
    ]
    total: Counter[tuple[str, bool]] = Counter()
    for collective, name in ALGORITHMS:
        count: Counter[tuple[str, bool]] = Counter()
        for size in sizes:
            plant(collective, name, size, lambda *one, count=count: count.update([one]))
        lines.append(f"| {collective} {name} | {_cells(count)} |")
        total += count
    return "\n".join([*lines, f"| all | {_cells(total)} |"])


def _cells(count: Counter[tuple[str, bool]]) -> str:
    planted = [count[kind, True] + count[kind, False] for kind in KINDS]
    caught = sum(count[kind, True] for kind in KINDS)
    return " | ".join(map(str, [*planted, sum(planted), caught, sum(planted) - caught]))


if __name__ == "__main__":
    print(table([2, 3, 4, 5, 6]))
