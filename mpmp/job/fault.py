"""Faults on purpose, for trials and tests: ``MPMP_FAULT=kind:rank=1:step=5``.

Kinds: ``raise`` an exception, ``exit`` (sys.exit(0)), ``kill`` (SIGKILL), ``hang`` (for ever),
``sleep`` (10 s, or ``:seconds=3``). Struck at the beginning of that step on that rank.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import dataclass

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

    def strike(self, rank: int, step: int) -> None:
        """Happen, where rank and step are meant."""
        if (rank, step) != (self.rank, self.step):
            return
        if self.kind == "raise":
            raise RuntimeError(f"MPMP_FAULT raised on rank {rank} at step {step}")
        if self.kind == "exit":
            sys.exit(0)
        if self.kind == "kill":
            ending.say(f"MPMP_FAULT kills rank {rank} at step {step}")
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
        )
    except (KeyError, ValueError):
        facts = {"": ""}
    if facts or kind not in _KINDS or min(fault.rank, fault.step) < 0 or not fault.seconds >= 0:
        raise ConfigError(
            f"MPMP_FAULT={text} is not understood; write kind:rank=1:step=5 "
            f"with a kind of {', '.join(_KINDS)}"
        )
    return fault
