"""One-shot allreduce: every rank sums all of everything for itself, after a single wait.

      slot of rank 0  [a0]    rank 0: a0+a1 -> its own result   1 wait: for short vectors. It
      slot of rank 1  [a1]    rank 1: a0+a1 -> its own result   reads (p+1) n, writes 2 n bytes.

Nobody says when it has read: the input is copied to one of two slots in turns, and a slot is
written again only after everybody has arrived with the other. Sums are in rank order. The one-shot
kernel of inference engines (NVIDIA's TensorRT-LLM and vLLM name it so).

What is longer than a slot passes in ``pieces``, with a wait each; between two waits one is summed
and the next is loaded:

      slots of rank 0  [a0|  ]  sum a, load b  [a0|b0]  sum b, load c  [c0|b0]  sum c
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from mpmp.programs.steps import Ranks
from mpmp.programs.windows import (
    ALL,
    RESULT,
    Await,
    Combine,
    Load,
    Publish,
    WindowAlgorithm,
    WindowCost,
    WindowStep,
)


def allreduce_one_shot(rank: Ranks, size: int, pieces: int = 1) -> Iterator[WindowStep]:
    yield Load(0)
    for piece in range(pieces):
        yield Publish()
        yield Await(ALL)
        yield Combine(piece, sum_from=ALL, store_to=RESULT)
        if piece + 1 < pieces:
            yield Load(piece + 1)


def num_chunks(size: int, pieces: int = 1) -> int:
    return pieces


def cost(size: int, pieces: int = 1) -> WindowCost:
    return WindowCost(syncs=pieces, read=Fraction(size + 1), written=Fraction(2))


ALLREDUCE_ONE_SHOT = WindowAlgorithm(
    allreduce_one_shot, num_chunks, cost, facts=("pieces",), slots=2
)
