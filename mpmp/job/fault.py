"""Faults on purpose, for trials and tests: ``MPMP_FAULT=kind:rank=1:step=5``.

Kinds: ``raise`` an exception, ``exit`` (sys.exit(0)), ``kill`` (SIGKILL), ``hang`` (for ever),
``sleep`` (10 s, or ``:seconds=3``). Struck at the beginning of that step on that rank; with
``:point=renamed`` at that point of the next save, one of those in ``checkpoint/points.py``.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import dataclass

from mpmp.checkpoint import points
from mpmp.comm import ending
from mpmp.errors import ConfigError

_KINDS = ("raise", "exit", "kill", "hang", "sleep")


@dataclass(frozen=True)
class Fault:
    """What happens to which rank, when."""

    kind: str
    rank: int
    step: int
    seconds: float = 10.0
    point: str | None = None

    def strike(self, rank: int, step: int) -> None:
        """Happen, where rank and step are meant; or see to it that it will, in the next save."""
        if (rank, step) != (self.rank, self.step):
            return
        if self.point is None:
            self._happen(rank, f"step {step}")
        else:
            points.hook = lambda name: (
                self._happen(rank, f"{name!r} of a save") if name == self.point else None
            )

    def _happen(self, rank: int, when: str) -> None:
        if self.kind == "raise":
            raise RuntimeError(f"MPMP_FAULT raised on rank {rank} at {when}")
        if self.kind == "exit":
            sys.exit(0)
        if self.kind == "kill":
            ending.say(f"MPMP_FAULT kills rank {rank} at {when}")
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(self.seconds if self.kind == "sleep" else float(10**6))


def fault_of(text: str | None) -> Fault | None:
    """The fault that a text asks for; ConfigError where it is not understood."""
    if not text:
        return None
    kind, *rest = text.split(":")
    facts = dict(part.partition("=")[::2] for part in rest)
    try:
        fault = Fault(
            kind,
            rank=int(facts.pop("rank")),
            step=int(facts.pop("step")),
            seconds=float(facts.pop("seconds", 10)),
            point=facts.pop("point", None),
        )
    except (KeyError, ValueError):
        facts = {"": ""}
    if facts or kind not in _KINDS or min(fault.rank, fault.step) < 0 or not fault.seconds >= 0:
        raise ConfigError(
            f"MPMP_FAULT={text} is not understood; write kind:rank=1:step=5 "
            f"with a kind of {', '.join(_KINDS)}"
        )
    if fault.point not in (None, *points.NAMES):
        raise ConfigError(
            f"MPMP_FAULT={text} names no point of a save; write one of {', '.join(points.NAMES)}"
        )
    return fault
