"""What a bench of generation finds: a row a model, with the columns of the CSV file."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mpmp.job.report import table


@dataclass(frozen=True)
class Row:
    """Tokens/s are new tokens over the whole time of a call, the prompt's included, by the median
    turn; ``ratio`` is the median over pairs of turns (NaN where ours ran alone)."""

    size: str
    ours_tokens_per_s: float
    theirs_tokens_per_s: float
    ratio: float

    @classmethod
    def of(cls, size: str, ours: Sequence[float], theirs: Sequence[float]) -> Row:
        """The row of tokens/s in turns that were taken in pairs."""
        if not theirs:
            return cls(size, statistics.median(ours), float("nan"), float("nan"))
        ratio = statistics.median(one / other for one, other in zip(ours, theirs, strict=True))
        return cls(size, statistics.median(ours), statistics.median(theirs), ratio)


def shown(rows: Iterable[Row], against: str) -> str:
    """The table that a person reads."""
    lines = [
        [row.size, *(f"{x:,.1f}" for x in (row.ours_tokens_per_s, row.theirs_tokens_per_s))]
        + [f"{row.ratio:.2f}"]
        for row in rows
    ]
    return table(["size", "ours tokens/s", f"{against} tokens/s", "ratio"], lines)
