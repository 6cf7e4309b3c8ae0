"""ZB-H1: 1F1B whose weight gradients wait and fill the bubble at the end, in no more memory.

    rank 0   F0 F1 F2       B0 W0 F3 B1 W1 B2 W2 B3 W3     bubble (p-1)(F+B-W) of a rank;
    rank 1      F0 F1    B0 F2 B1 W0 F3 B2 W1 B3 W2 W3     no rank holds more than p
    rank 2         F0 B0 F1 B1 F2 B2 W0 F3 B3 W1 W2 W3     microbatches, W counted in

A backward sends the gradient of its input on before it turns to the weights. Rank s lets s weight
gradients wait, so that all ranks hold as many microbatches as rank 0 must.
Qi et al. 2023, "Zero Bubble Pipeline Parallelism", section 3.1.
"""

from __future__ import annotations

from collections.abc import Iterator

from mpmp.programs.steps import BACKWARD, FORWARD, WEIGHT, Action, Schedule


def program(rank: int, ranks: int, microbatches: int) -> Iterator[Action]:
    warmup = min(ranks - rank - 1, microbatches)
    for microbatch in range(warmup):
        yield Action(FORWARD, microbatch)
    for microbatch in range(microbatches):
        if warmup + microbatch < microbatches:
            yield Action(FORWARD, warmup + microbatch)
        yield Action(BACKWARD, microbatch)
        if microbatch >= rank:
            yield Action(WEIGHT, microbatch - rank)
    for microbatch in range(max(microbatches - rank, 0), microbatches):
        yield Action(WEIGHT, microbatch)


def bubble(ranks: int, microbatches: int, forward: float, backward: float, weight: float) -> float:
    """Seconds that a rank is idle, from p microbatches on."""
    return (ranks - 1) * (forward + backward - weight)


ZB_H1 = Schedule("zb_h1", program, "Qi et al. 2023, ZB-H1", splits=True, bubble=bubble)
