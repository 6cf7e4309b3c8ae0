"""Fit: what a message, a byte and a byte combined cost, out of measured times of programs.

The time of a program is linear in alpha, beta and gamma as long as its longest chain is the same:
``rounds alpha + chain bytes beta + bytes combined gamma``. The simulator gives these factors for
every row, least squares on the relative error with no number below zero gives the link, and then
the chains are looked at again, until they stay. Intervals are of 95 %, by drawing rows again.

Beside it stands the plain model ``T = a B N`` of many texts, linear in the number of transfers: B
bytes on N ranks, a the time of a byte. A ring is nearly flat in N; both models meet the same rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpmp.errors import ConfigError
from mpmp.programs.cluster import Link, Links, Memory
from mpmp.programs.collectives import COLLECTIVES, find
from mpmp.programs.least_squares import non_negative_least_squares
from mpmp.programs.predict import crossover as crossover
from mpmp.programs.predict import predict as predict
from mpmp.programs.windows import WindowAlgorithm

Vector = NDArray[Any]

SAME_HOST, OTHER_HOST, WINDOW = "same host", "other host", "window"
_NAMES = {
    SAME_HOST: ("alpha", "beta", "gamma"),
    OTHER_HOST: ("alpha", "beta", "gamma"),
    WINDOW: ("sync", "memory"),
}
_COLUMNS = [(link_class, name) for link_class, names in _NAMES.items() for name in names]
# Where the search for the longest chains begins: a usual machine.
_USUAL = np.array([1e-6, 1e-10, 1e-10, 1e-5, 1e-9, 1e-10, 1e-6, 1e-10])
_SMALLEST_STEP = np.array([1e-10, 1e-15, 1e-15] * 2 + [1e-10, 1e-15])
_LOOKS = 5
_DRAWS = 200


@dataclass(frozen=True, slots=True)
class Row:
    """A measured time; ``hosts`` is the number of hosts, filled in order and alike."""

    collective: str
    algorithm: str
    ranks: int
    hosts: int
    bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Estimate:
    """A fitted number in seconds (a message, or a byte) with its interval of 95 %.

    Not ``known``: it sits on its bound, or other numbers could take its place in every row.
    """

    value: float
    low: float
    high: float
    known: bool


@dataclass(frozen=True, slots=True)
class ClassFit:
    """The numbers of one link class, and how far both models are off its rows (1 is 100 %)."""

    link_class: str
    estimates: dict[str, Estimate]
    num_rows: int
    median_error: float
    max_error: float
    plain_s: float
    plain_median_error: float
    plain_max_error: float

    @property
    def plain_fits_better(self) -> bool:
        return self.plain_median_error < self.median_error

    def __str__(self) -> str:
        numbers = []
        for name in _NAMES[self.link_class]:
            unit, factor = ("us", 1e6) if name in ("alpha", "sync") else ("ns/B", 1e9)
            one = self.estimates.get(name)
            if one is None:
                numbers.append(f"{name} not measured")
            elif not one.known:
                numbers.append(f"{name} not identifiable")
            else:
                value, low, high = (factor * part for part in (one.value, one.low, one.high))
                numbers.append(f"{name} {value:.4g} {unit} ({low:.4g} to {high:.4g})")
        head = f"{self.link_class}, {self.num_rows} rows: {', '.join(numbers)}"
        if not self.num_rows:
            return head
        better = (
            "T = a B N fits better"
            if self.plain_fits_better
            else f"{', '.join(_NAMES[self.link_class])} fit better"
        )
        return (
            f"{head}\n"
            f"  median error {100 * self.median_error:.1f} %, largest {100 * self.max_error:.1f} %;"
            f" T = a B N with a = {1e9 * self.plain_s:.4g} ns: median error "
            f"{100 * self.plain_median_error:.1f} %, "
            f"largest {100 * self.plain_max_error:.1f} %; {better}"
        )


@dataclass(frozen=True, slots=True)
class Fit:
    """What the rows say of every link class that they use; ``predict`` takes it as it is."""

    classes: tuple[ClassFit, ...]

    @property
    def links(self) -> Links:
        """The numbers as a description to simulate; what is not identifiable counts as fitted.

        A class of which not even a message and a byte were measured is left out.
        """
        found: dict[str, Any] = {}
        for one in self.classes:
            names = _NAMES[one.link_class]
            if not set(names[:2]) <= one.estimates.keys():
                continue
            numbers = [one.estimates[name].value if name in one.estimates else 0 for name in names]
            made = Memory(*numbers) if one.link_class == WINDOW else Link(*numbers)
            found[{WINDOW: "memory"}.get(one.link_class, one.link_class.replace(" ", "_"))] = made
        return Links(**found)

    def __str__(self) -> str:
        return "\n".join(map(str, self.classes))


def fit(rows: Sequence[Row]) -> Fit:
    """Fit every link class that the rows use; rows of algorithms that are not ours are left out."""
    rows = [row for row in rows if row.algorithm in COLLECTIVES.get(row.collective, {})]
    rows = [row for row in rows if row.ranks > 1]
    if not rows:
        raise ConfigError("a fit needs measured rows of our algorithms on at least 2 ranks")
    for row in rows:
        if not (isfinite(row.seconds) and row.seconds > 0 and 1 <= row.hosts <= row.ranks):
            raise ConfigError(f"a fit needs a time above 0 on 1 to {row.ranks} hosts, not {row}")
    seconds = np.array([row.seconds for row in rows])
    numbers, before = _USUAL, np.zeros(0)
    for _ in range(_LOOKS):
        factors = np.array([_factors(row, tuple(numbers)) for row in rows])
        numbers = non_negative_least_squares(factors / seconds[:, None], np.ones(len(rows)))
        if len(before) and np.allclose(factors, before, rtol=1e-3):
            break
        before = factors
    predicted = _predicted(rows, numbers)
    estimates = _estimates(factors / seconds[:, None], numbers)
    classes = np.array([class_of(row) for row in rows])
    found = []
    for link_class, names in _NAMES.items():
        here = {n: estimates[link_class, n] for n in names if (link_class, n) in estimates}
        if here:
            of_class = classes == link_class
            mine = [row for row, is_mine in zip(rows, of_class, strict=True) if is_mine]
            found.append(_judge(link_class, here, mine, predicted[of_class]))
    return Fit(tuple(found))


def class_of(row: Row) -> str:
    """The link class whose numbers a row is there for: hosts that are several matter most."""
    if isinstance(find(row.collective, row.algorithm), WindowAlgorithm):
        return WINDOW
    return SAME_HOST if row.hosts == 1 else OTHER_HOST


def _judge(
    link_class: str, estimates: dict[str, Estimate], rows: list[Row], predicted: Vector
) -> ClassFit:
    """Hold both models against the rows of a class."""
    if not rows:  # a host's own link that was only measured on several hosts
        return ClassFit(link_class, estimates, 0, *[float("nan")] * 5)
    seconds = np.array([row.seconds for row in rows])
    transfers = np.array([float(row.bytes * row.ranks) for row in rows])
    relative = transfers / seconds
    plain_s = float(relative.sum() / max((relative**2).sum(), 1e-300))
    error, plain = (np.abs(x / seconds - 1) for x in (predicted, plain_s * transfers))
    return ClassFit(
        link_class,
        estimates,
        len(rows),
        float(np.median(error)),
        float(error.max()),
        plain_s,
        float(np.median(plain)),
        float(plain.max()),
    )


# --- the linear pieces of a time, and what the rows say of each ---------------------------------


def _factors(row: Row, numbers: tuple[float, ...]) -> Vector:
    """How often each number is on the row's longest chain: the slope of the time in each."""
    at = np.array(numbers)
    here = _seconds(row, at)
    factors = np.zeros(len(_COLUMNS))
    for column, (link_class, _) in enumerate(_COLUMNS):
        if link_class in _used(row):
            step = max(1e-4 * at[column], _SMALLEST_STEP[column])
            there = at.copy()
            there[column] += step
            factors[column] = (_seconds(row, there) - here) / step
    # Rounding leaves a trace where there is nothing.
    reach = np.maximum(np.abs(at), _SMALLEST_STEP)
    factors[factors * reach < 1e-9 * here] = 0.0
    return factors


def _used(row: Row) -> tuple[str, ...]:
    link_class = class_of(row)
    mixed = link_class == OTHER_HOST and row.hosts < row.ranks
    return (SAME_HOST, OTHER_HOST) if mixed else (link_class,)


def _seconds(row: Row, numbers: Vector) -> float:
    links = Links(Link(*numbers[:3]), Link(*numbers[3:6]), Memory(*numbers[6:]))
    return predict(links, row.collective, row.algorithm, row.ranks, row.bytes, row.hosts)


def _predicted(rows: list[Row], numbers: Vector) -> Vector:
    return np.array([_seconds(row, numbers) for row in rows])


def _estimates(weighed: Vector, numbers: Vector) -> dict[tuple[str, str], Estimate]:
    """Intervals of all numbers that any row depends on, and whether the rows settle them."""
    chance, num_rows = np.random.default_rng(0), len(weighed)
    drawn = np.array(
        [
            non_negative_least_squares(
                weighed[chance.integers(0, num_rows, num_rows)], np.ones(num_rows)
            )
            for _ in range(_DRAWS)
        ]
    )
    low, high = np.quantile(drawn, (0.025, 0.975), axis=0)
    lengths = np.linalg.norm(weighed, axis=0)
    used = np.flatnonzero(lengths > 0)
    # A direction in which the numbers move and no row does: whoever is in it is not settled.
    scaled = weighed[:, used] / lengths[used]
    squares, directions = np.linalg.eigh(scaled.T @ scaled)
    flat = directions[:, squares < 1e-11 * squares[-1]]
    loose = np.abs(flat).max(axis=1, initial=0.0) > 1e-3
    return {
        _COLUMNS[column]: Estimate(
            float(numbers[column]),
            float(low[column]),
            float(high[column]),
            bool(numbers[column] > 0 and not is_loose),
        )
        for column, is_loose in zip(used, loose, strict=True)
    }
