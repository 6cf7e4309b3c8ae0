"""Two-shot allreduce: every rank sums its part of all, and copies the others' parts of the sum.

      slot of rank 0  [  |b0]    rank 0: a0+a1 -> own result, own slot    [A |b0]    B -> own result
      slot of rank 1  [a1|  ]    rank 1: b0+b1 -> own result, own slot    [a1|B ]    A -> own result

A rank loads what the others sum, so its own part's place in its slot is free for the sum. Reads and
writes less than one-shot for one wait more; the same halves as reduce-scatter and allgather, with
sums in rank order. The two-shot kernel of inference engines (NVIDIA's TensorRT-LLM names it so).

What is longer than a slot passes in ``pieces``. Between two waits a rank sums one, loads the next
and copies the sums of the last: all that it reads was published, what it writes is.

      wait  0   1   2   3       slots are taken in turns: one is filled again only after everybody
      load  0   1   2           has published once more, and has read it before
      sum       0   1   2
      copy          0   1   2
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from mpmp.programs.steps import Ranks
from mpmp.programs.windows import (
    ALL,
    RESULT,
    RESULT_AND_SLOT,
    Await,
    Combine,
    Load,
    Publish,
    WindowAlgorithm,
    WindowCost,
    WindowStep,
)


def allreduce_two_shot(rank: Ranks, size: int, pieces: int = 1) -> Iterator[WindowStep]:
    others = [(rank + distance) % size for distance in range(1, size)]
    for turn in range(pieces + 2):
        if turn > 0:
            yield Publish()
            yield Await(ALL)
        if 1 <= turn <= pieces:
            own = (turn - 1) * size + rank
            yield Combine(own, sum_from=ALL, store_to=RESULT_AND_SLOT)
        if turn < pieces:
            for other in others:
                yield Load(turn * size + other)
        if turn >= 2:
            for other in others:
                yield Combine((turn - 2) * size + other, sum_from=other, store_to=RESULT)


def num_chunks(size: int, pieces: int = 1) -> int:
    return pieces * size


def cost(size: int, pieces: int = 1) -> WindowCost:
    return WindowCost(syncs=pieces + 1, read=Fraction(3 * size - 2, size), written=Fraction(2))


ALLREDUCE_TWO_SHOT = WindowAlgorithm(
    allreduce_two_shot, num_chunks, cost, facts=("pieces",), slots=2
)
