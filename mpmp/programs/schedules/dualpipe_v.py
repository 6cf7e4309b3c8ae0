"""DualPipeV: DualPipe cut in half, a V of two chunks whose forwards and backwards are fused.

    rank 0   stages 0 and 5     main phase, on every rank:  F.0&B.1  F.1&B.0  F.0&B.1 ..
    rank 1   stages 1 and 4     bubble (p-1)(F&B + B - 3W) of a rank, B with its W;
    rank 2   stages 2 and 3     at most 2p+1 chunks' microbatches alive, p + 1/2 M_B

A forward and a backward of different microbatches need nothing of each other, so that each may
cover the other's communication (all-to-alls of experts, sums of tensor parallelism). Weight
gradients wait where the pipeline fills and drains only.
DeepSeek-AI 2024 (DualPipe), Qi 2025 ("cut in half"); github.com/deepseek-ai/DualPipe.
"""

from __future__ import annotations

from collections.abc import Iterator

from mpmp.programs.schedules.order import Order, only
from mpmp.programs.steps import Action, Fused, Schedule


def program(rank: int, ranks: int, microbatches: int) -> Iterator[Action | Fused]:
    # Fewer than fill the pipeline are the schedule of those that do, without the missing ones.
    full, later = max(microbatches, 2 * ranks), ranks - rank - 1
    order = Order()
    for _ in range(2 * later):
        order.forward(0)
    for _ in range(rank + 1):
        order.forward(0)
        order.forward(1)
    for _ in range(later):
        _whole(order, 1)
        order.forward(1)
    for number in range(full - 2 * ranks + rank + 1):
        if number == 0 and rank == ranks - 1:
            # The first backward of all: the rest of the pipeline waits for it alone.
            order.forward(0)
            _whole(order, 1)
        else:
            _fused(order, 0, 1)
        _fused(order, 1, 0)
    for _ in range(later):
        _whole(order, 1)
        _fused(order, 1, 0)
    # The drain: the second half of these backwards leave their weights for the end.
    for number in range(2 * (rank + 1)):
        order.backward(1 - number % 2)
        if number <= rank:
            order.weight()
    for _ in range(later):
        order.weight()
        order.backward(0)
    while order.waiting:
        order.weight()
    return only(order.actions, microbatches)


def _whole(order: Order, chunk: int) -> None:
    order.backward(chunk)
    order.weight()


def _fused(order: Order, forward: int, backward: int) -> None:
    order.fused(forward, backward)
    order.weight()


def bubble(ranks: int, microbatches: int, forward: float, backward: float, weight: float) -> float:
    """Seconds that a rank is idle, of times of one chunk, where fusing saves nothing."""
    return (ranks - 1) * (forward + 2 * backward - weight)


DUALPIPE_V = Schedule(
    "dualpipe_v",
    program,
    "DeepSeek-AI 2024, DualPipeV",
    chunks=2,
    folded=True,
    splits=True,
    bubble=bubble,
)
