"""One-shot allreduce: every rank sums all of everything for itself, after a single wait.

      slot 0  [a0]      rank 0: a0+a1 -> its own result     1 wait: for short vectors.
      slot 1  [a1]      rank 1: a0+a1 -> its own result     Each rank reads p n and writes n bytes.

Nobody says when it has read: the input is copied to one of two slots in turns, and a slot is
written again only after everybody has arrived with the other. Sums are in rank order. The one-shot
kernel of inference engines (NVIDIA's TensorRT-LLM and vLLM name it so).
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from mpmp.programs.steps import Ranks, whole
from mpmp.programs.windows import (
    ALL,
    RESULT,
    Await,
    Combine,
    Publish,
    WindowAlgorithm,
    WindowCost,
    WindowStep,
)


def allreduce_one_shot(rank: Ranks, size: int) -> Iterator[WindowStep]:
    yield Publish()
    yield Await(ALL)
    yield Combine(chunk=0, sum_from=ALL, store_to=RESULT)


def cost(size: int) -> WindowCost:
    return WindowCost(syncs=1, read=Fraction(size), written=Fraction(1))


ALLREDUCE_ONE_SHOT = WindowAlgorithm(allreduce_one_shot, whole, cost, slots=2)
