"""All ranks of a collective at once: which send meets which receive."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from mpmp.errors import ProgramError
from mpmp.programs.exchange import Exchange, Vector, spread
from mpmp.programs.meeting import fault, live, peer_of
from mpmp.programs.steps import NONE, Algorithm, Reduce, Round, Send, Step

ONE_BY_ONE = 64
"""Up to this size every rank's program is run by itself; larger groups give it a vector of ranks,
which the tests prove to be the same."""


def follow_collective(algorithm: Algorithm, size: int, **facts: Any) -> list[Exchange]:
    """What moves in every round; a ProgramError names the rank, the round and what is wrong."""
    if not isinstance(algorithm, Algorithm):
        raise ProgramError(
            f"{getattr(algorithm, 'program', algorithm)} sends no messages; only a program of "
            "rounds can be followed and drawn"
        )
    unknown = sorted(set(facts) - set(algorithm.facts))
    if unknown:
        takes = ", ".join(algorithm.facts) or "none"
        raise ProgramError(f"the program takes no fact {unknown[0]}; its facts: {takes}")
    num_chunks = algorithm.num_chunks(size, **facts)
    for rounds in _tables(algorithm, size, facts):
        exchanges = [_exchange(steps, size, num_chunks) for steps in rounds]
        met = [one for one in exchanges if one is not None]
        if len(met) == len(exchanges):
            return met
    programs = [list(algorithm.program(rank, size, **facts)) for rank in range(size)]
    reason = fault(programs, num_chunks)
    assert reason is not None, "steps that do not meet in columns meet one by one"
    raise ProgramError(reason)


# --- the steps of a round as columns ------------------------------------------------------------

SEND, RECEIVE, REDUCE = range(3)


def _tables(algorithm: Algorithm, size: int, facts: dict[str, Any]) -> Iterator[list[Vector]]:
    """For every round [rank | kind | peer | chunk | count, step], from a vector of ranks if the
    group is large, then from the ranks one by one."""
    if size > ONE_BY_ONE:
        try:
            together = algorithm.program(np.arange(size), size, **facts)
            yield [_columns(one, size) for one in together]
        except (AttributeError, TypeError, ValueError):
            pass  # a program that branches on its rank cannot take a vector of them
    programs = [list(algorithm.program(rank, size, **facts)) for rank in range(size)]
    if all(len(rounds) == len(programs[0]) for rounds in programs):
        yield [_rows(rounds) for rounds in zip(*programs, strict=True)]


def _kind(step: Step) -> int:
    return SEND if isinstance(step, Send) else REDUCE if isinstance(step, Reduce) else RECEIVE


def _rows(rounds: Iterable[Round]) -> Vector:
    """The steps of one round, given rank by rank."""
    rows = [
        (rank, _kind(step), peer_of(step), step.chunk, step.count)
        for rank, one in enumerate(rounds)
        for step in live(one)
    ]
    return np.array(rows, np.int64).reshape(-1, 5).T


def _columns(one: Round, size: int) -> Vector:
    """The steps of one round, given for a vector of ranks."""
    table = np.empty((5, len(one.steps), size), np.int64)
    table[0] = np.arange(size)
    for place, step in enumerate(one.steps):
        for row, word in enumerate((_kind(step), peer_of(step), step.chunk, step.count), start=1):
            table[row, place] = word
    live_steps: Vector = table.reshape(5, -1)[:, table[2].reshape(-1) != NONE]
    return live_steps


def _exchange(steps: Vector, size: int, num_chunks: int) -> Exchange | None:
    """The steps of a round as rows of what meets; None where anything is wrong with them."""
    rank, kind, peer, chunk, count = steps
    lies = (chunk >= 0) & (count >= 1) & (chunk + count <= num_chunks)
    if not (lies & (peer >= 0) & (peer < size) & (peer != rank)).all():
        return None
    # In the order of sender and receiver; the sort is stable and keeps the order of the steps.
    key = np.where(kind == SEND, rank * size + peer, peer * size + rank)
    in_order = np.argsort(key, kind="stable")
    sends, puts = (in_order[(kind[in_order] == SEND) == wanted] for wanted in (True, False))
    if len(sends) != len(puts) or (key[sends] != key[puts]).any():
        return None
    if (count[sends] != count[puts]).any():
        return None
    exchange = Exchange(
        rank[sends], rank[puts], chunk[sends], chunk[puts], count[puts], kind[puts] == REDUCE
    )
    return None if _overlaps(exchange, num_chunks) else exchange


def _overlaps(exchange: Exchange, num_chunks: int) -> bool:
    """Whether a chunk is written twice and not only combined, each time with another rank's."""
    receivers = np.sort(exchange.receiver)
    if (receivers[1:] != receivers[:-1]).all():
        return False
    cell = spread(exchange.receiver * num_chunks + exchange.put, exchange.count)
    sender = np.repeat(exchange.sender, exchange.count)
    combines = np.repeat(exchange.combines, exchange.count)
    in_order = np.lexsort((sender, cell))
    cell, sender, combines = cell[in_order], sender[in_order], combines[in_order]
    twice = cell[1:] == cell[:-1]
    fits = combines[1:] & combines[:-1] & (sender[1:] != sender[:-1])
    return bool((twice & ~fits).any())
