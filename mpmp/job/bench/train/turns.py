"""Contenders that train in turns, so that whatever else the machine does meets all of them.

warm-up   ours | theirs | beside        a turn is some steps, begun by all ranks together;
turn 1    ours | theirs | beside        who has no part in it sleeps
turn 2    ours | theirs | beside
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from mpmp.comm.group import Group
from mpmp.comm.world import World


@dataclass
class Contender:
    """``step`` takes an optimiser step and gives the loss that this rank sees, or None; it is None
    itself on a rank that has no part."""

    name: str
    step: Callable[[int], float | None] | None
    tokens: int
    """Of a step, over all ranks."""
    speeds: list[float] = field(default_factory=list)
    """Tokens/s of each turn; the first was to warm up."""
    losses: list[float] = field(default_factory=list)
    """Of each step, the mean over the ranks that saw one."""


def take(
    contenders: list[Contender], group: Group, world: World, steps: int, turns: int
) -> Iterator[tuple[int, Contender]]:
    """Let all take ``turns`` turns of ``steps`` steps each, yielding after each turn."""
    for turn in range(turns):
        for one in contenders:
            numbers = range(turn * steps, (turn + 1) * steps)
            group.barrier()
            began = time.perf_counter()
            losses = [one.step(number) for number in numbers] if one.step is not None else []
            own = {"seconds": time.perf_counter() - began, "losses": losses}
            every = [json.loads(text) for text in world.gather_texts(json.dumps(own))]
            slowest_s = max(rank["seconds"] for rank in every)
            one.speeds.append(steps * one.tokens / slowest_s)
            for at in range(steps):
                seen = [rank["losses"][at] for rank in every if rank["losses"]]
                known = [loss for loss in seen if loss is not None]
                one.losses.append(sum(known) / len(known))
            yield turn, one
