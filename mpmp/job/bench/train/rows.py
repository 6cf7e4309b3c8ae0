"""What a bench of training finds: a row a mode, with the columns of the CSV file."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mpmp.job.report import table

LIMITS = {"bfloat16": 2e-2, "float32": 1e-5}
"""Largest difference of two losses, in nats, that is still the same training."""


@dataclass(frozen=True)
class Row:
    """Tokens/s are of all ranks together, by the median turn; ``ratio`` is the median over pairs
    of turns, ``loss_gap`` the largest difference of the losses of a step, in nats (NaN where other
    data are learnt)."""

    mode: str
    ours_tokens_per_s: float
    theirs_tokens_per_s: float
    ratio: float
    loss_gap: float

    @classmethod
    def of(cls, mode: str, ours: Sequence[float], theirs: Sequence[float], loss_gap: float) -> Row:
        """The row of tokens/s in turns that were taken in pairs."""
        ratio = statistics.median(one / other for one, other in zip(ours, theirs, strict=True))
        return cls(mode, statistics.median(ours), statistics.median(theirs), ratio, loss_gap)


def gap(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The largest difference of two losses of one step; NaN counts as the largest of all."""
    gaps = [abs(one - other) for one, other in zip(ours, theirs, strict=True)]
    return next((one for one in gaps if one != one), max(gaps))


def shown(rows: Iterable[Row], against: dict[str, str]) -> str:
    """The table that a person reads."""
    head = ["mode", "ours tokens/s", "against", "tokens/s", "ratio", "loss gap"]
    lines = [
        [
            row.mode,
            f"{row.ours_tokens_per_s:,.0f}",
            against[row.mode],
            f"{row.theirs_tokens_per_s:,.0f}",
            f"{row.ratio:.2f}",
            "" if row.loss_gap != row.loss_gap else f"{row.loss_gap:.1e}",
        ]
        for row in rows
    ]
    return table(head, lines)
