"""Check: proof that a program does what its collective promises, at its published cost.

All ranks are followed symbolically (see ``contributions``). A program is right when every chunk
ends in its place with the contributions its collective promises, each exactly once, and where all
ranks must hold one result, combined in one order on all of them: the same bits. No number is ever
added, so the proof holds for all data.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpmp.errors import ProgramError
from mpmp.programs.check_windows import WindowReport, check_window
from mpmp.programs.collectives import find
from mpmp.programs.contributions import (
    MIXED,
    OFTEN,
    Contents,
    bits_of,
    combined,
    fingerprints,
)
from mpmp.programs.exchange import Exchange
from mpmp.programs.follow import follow_collective
from mpmp.programs.promises import EVERYBODY, NOTHING, PROMISES, Promise
from mpmp.programs.steps import Algorithm, Cost
from mpmp.programs.tables import look_up
from mpmp.programs.windows import WindowAlgorithm


@dataclass(frozen=True, slots=True)
class CollectiveReport:
    """What was proved of a collective on ``size`` ranks; bytes as multiples of n.

    ``chain`` is the sum over the rounds of the longest message: what a cost that is written round
    by round counts.
    """

    size: int
    rounds: int
    messages: int
    sent: Fraction
    reduced: Fraction
    received: Fraction
    chain: Fraction


def check(
    collective: str, algorithm: Algorithm | WindowAlgorithm | str, size: int, **facts: Any
) -> CollectiveReport | WindowReport:
    """Prove the algorithm on ``size`` ranks, or raise a ProgramError with rank, round, reason."""
    promise = look_up(PROMISES, collective, "collective")
    if isinstance(algorithm, str):
        algorithm = find(collective, algorithm)
    try:
        if isinstance(algorithm, WindowAlgorithm):
            return check_window(collective, algorithm, size, **facts)
        rounds = follow_collective(algorithm, size, **facts)
        num_chunks = algorithm.num_chunks(size, **facts)
        promised = promise(size, num_chunks, **facts)
        contents = Contents(rounds, size, num_chunks)
        _check_contributions(contents, promised, once=collective != "barrier")
        if collective != "barrier":
            _check_order(contents, promised, algorithm.fixed_order)
        # The buffer of an all-to-all is its input, n, and its output.
        chunks_of_n = num_chunks // 2 if collective == "alltoall" else num_chunks
        return _check_cost(rounds, algorithm.cost(size, **facts), size, chunks_of_n)
    except ProgramError as error:
        name = getattr(algorithm.program, "__name__", collective)
        raise ProgramError(f"{name} on {size} ranks: {error}") from None


def _check_contributions(contents: Contents, promised: Promise, once: bool) -> None:
    """Hold what every chunk ends with against the promise."""
    giver = promised.giver.reshape(-1)
    spoken_of = giver != NOTHING
    for ranks, found, twice in contents.sets():
        words = found.shape[1]
        everybody = np.bitwise_or.reduce(bits_of(np.arange(len(ranks)), words))
        wanted = bits_of(np.where(giver >= 0, giver - ranks.start, -1), words)
        wanted[giver == EVERYBODY] = everybody
        wrong = (found ^ wanted) | (twice if once else np.uint64(0))
        for cell in np.flatnonzero(spoken_of & wrong.any(1))[:1].tolist():
            word = int(np.flatnonzero(wrong[cell])[0])
            bit = int(wrong[cell, word]) & -int(wrong[cell, word])
            often = OFTEN[bool(int(found[cell, word]) & bit) + bool(int(twice[cell, word]) & bit)]
            must = "exactly once" if once else "at least once"
            raise ProgramError(
                f"{contents.last_write(cell)} {often} what rank "
                f"{ranks[64 * word + bit.bit_length() - 1]} gave, which must be in it "
                f"{must if int(wanted[cell, word]) & bit else 'not at all'}"
            )
    origin = contents.origins(promised.start.reshape(-1))
    for cell in np.flatnonzero((origin != promised.origin.reshape(-1)) & spoken_of)[:1].tolist():
        lies = origin[cell]
        what = "a mix of several chunks" if lies == MIXED else f"chunk {lies} of the input"
        raise ProgramError(f"{contents.last_write(cell)} as {what}")


def _check_order(contents: Contents, promised: Promise, fixed: bool) -> None:
    """All ranks must combine a chunk in one order; ``fixed``: one rank after the other."""
    summed: NDArray[np.bool_] = promised.giver == EVERYBODY
    if not summed.any():
        return
    order = contents.orders().reshape(summed.shape)
    if fixed:
        leaves = fingerprints(np.arange(contents.size))
        wanted = leaves[:1]
        for rank in range(1, contents.size):
            wanted = combined(wanted, leaves[rank : rank + 1])
        than = "in the order of the ranks"
    else:
        wanted = np.take_along_axis(order, summed.argmax(0)[None], 0)
        than = f"as on rank {int(summed.argmax(0)[0])}"
    for rank, chunk in np.argwhere(summed & (order != wanted))[:1].tolist():
        raise ProgramError(
            f"{contents.last_write(rank * contents.num_chunks + chunk)} combined otherwise than "
            f"{than}, and so with other bits"
        )


def _check_cost(
    rounds: list[Exchange], cost: Cost, size: int, chunks_of_n: int
) -> CollectiveReport:
    """Hold rounds, and the most that any rank sends, reduces, receives, against the closed form."""
    if len(rounds) != cost.rounds:
        raise ProgramError(
            f"rank 0, round {len(rounds)}: the program ends here and its cost says "
            f"{cost.rounds} rounds"
        )
    chunks = {what: np.zeros(size, np.int64) for what in ("sent", "reduced", "received")}
    num_messages = chain = 0
    for one in rounds:
        np.add.at(chunks["sent"], one.sender, one.count)
        np.add.at(chunks["reduced"], one.receiver, one.count * one.combines)
        np.add.at(chunks["received"], one.receiver, one.count)
        if len(one.count):
            lengths = np.add.reduceat(one.count, one.first_rows)
            num_messages, chain = num_messages + len(lengths), chain + int(lengths.max())
    found = {}
    for what, by_rank in chunks.items():
        found[what] = Fraction(int(by_rank.max()), chunks_of_n)
        promised = getattr(cost, what)
        if found[what] != promised:
            raise ProgramError(
                f"rank {by_rank.argmax()}, round {len(rounds)} (the end): it has {what} "
                f"{found[what]} n, the most of all, and the cost says {promised} n"
            )
    return CollectiveReport(
        size, len(rounds), num_messages, **found, chain=Fraction(chain, chunks_of_n)
    )
