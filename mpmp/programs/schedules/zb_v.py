"""ZB-V: two chunks a rank, there and back, so that the loss is on rank 0 and the bubble is gone.

    rank 0   stages 0 and 5     F  down    F.1  up      bubble 0 where F = B = W;
    rank 1   stages 1 and 4     |   v       ^   |       every rank holds at most p microbatches
    rank 2   stages 2 and 3     ----> turn -----        of both its chunks (p M_B), as in 1F1B

A microbatch comes back to the rank on which it began: its first backward starts on rank 0 at once,
and all ranks hold activations for as long.
Qi et al. 2024, "Pipeline Parallelism with Controllable Memory", and 2023, section 6.
"""

from __future__ import annotations

from collections.abc import Iterator

from mpmp.programs.schedules.order import Order, only
from mpmp.programs.steps import Action, Fused, Schedule


def program(rank: int, ranks: int, microbatches: int) -> Iterator[Action | Fused]:
    # Fewer than fill the pipeline are the schedule of those that do, without the missing ones.
    full = max(microbatches, 2 * ranks - 1)
    order = Order()
    for _ in range(2 * (ranks - rank) - 1):
        order.forward(0)
    for _ in range(rank):
        order.forward(1)
        order.forward(0)
    for _ in range(ranks - rank):
        order.forward(1)
        order.backward(1)
        order.weight()
    while order.forwards[1] < full:
        if order.forwards[0] < full:
            order.forward(0)
        order.backward(0)
        order.weight()
        order.forward(1)
        order.backward(1)
        order.weight()
    for _ in range(rank):
        order.backward(0)
        order.backward(1)
    for _ in range(ranks - rank):
        order.backward(0)
        order.weight()
    while order.waiting:
        order.weight()
    return only(order.actions, microbatches)


ZB_V = Schedule("zb_v", program, "Qi et al. 2024, ZB-V", chunks=2, folded=True, splits=True)
