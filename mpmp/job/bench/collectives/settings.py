"""What ``mpmp.bench collectives`` can be told; nothing here needs torch or MPI."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import isfinite
from typing import Literal

from mpmp.config import Comm
from mpmp.errors import ConfigError
from mpmp.programs.collectives import COLLECTIVES
from mpmp.programs.tables import look_up

AUTO = "auto"
BASELINES = ("native", "gloo")
_UNITS = {"": 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
_MOST_BYTES = 1 << 40


@dataclass(frozen=True)
class Collectives:
    """What is timed, against whom, and where the figures go."""

    collectives: str = "all"
    """Names of collectives, with commas between: allreduce,broadcast; or all."""
    algorithms: str = "all"
    """Names of algorithms, auto (our choice) among them; or all."""
    against: str = "native"
    """Who else is timed: native (the MPI library's own), gloo (torch's), native,gloo; or none."""
    placement: Literal["window", "ordinary"] = "window"
    """Where our tensors live: in memory that a host's ranks share, or in memory of one's own."""
    dtype: Literal["float32", "float64", "float16", "bfloat16", "int32"] = "float32"
    """Type of the elements."""
    smallest: str = "1KiB"
    """Shortest array."""
    largest: str = "64MiB"
    """Longest array."""
    factor: int = 4
    """Each array is that many times as long as the one before."""
    sizes: str | None = None
    """Lengths of the arrays in place of the last three: 1KiB,48KiB,5MiB."""
    repeats: int = 20
    """Samples of each contender at each size."""
    seconds: float = 2.0
    """Time that a contender may take for its samples of one size; at least 3 are taken."""
    csv: str | None = None
    """File that takes the rows, too."""
    png: str | None = None
    """File that takes a picture: time over bytes (needs matplotlib)."""
    table: str | None = None
    """File that takes the times, for --comm.table of later runs; added to what it holds."""
    bound: bool = False
    """Measure what memory allows at the largest size, and the share that allreduce reaches."""
    comm: Comm = field(default_factory=Comm)
    """Settings of auto, and how long a rank waits for a peer."""

    def __post_init__(self) -> None:
        _ = self.names, self.baselines, self.lengths  # wrong ones are refused now
        if not any(map(self.algorithms_of, self.names)):
            raise ConfigError(f"{self.algorithms} names no algorithm of {self.collectives}")
        if self.repeats < 1:
            raise ConfigError(f"bench needs at least one repeat, not {self.repeats}")
        if not (isfinite(self.seconds) and self.seconds > 0):
            raise ConfigError(f"seconds must be positive and finite, not {self.seconds}")
        if self.bound and "allreduce" not in self.names:
            raise ConfigError("--bound speaks of the allreduce; name it with --collectives")

    @property
    def names(self) -> list[str]:
        """Collectives that are timed."""
        asked = list(COLLECTIVES) if self.collectives == "all" else _listed(self.collectives)
        for name in asked:
            look_up(COLLECTIVES, name, "collective")
        return asked

    @property
    def baselines(self) -> list[str]:
        """Others that are timed, as rows name them."""
        asked = [] if self.against == "none" else _listed(self.against)
        for name in asked:
            look_up(dict.fromkeys([*BASELINES, "none"]), name, "baseline")
        return asked

    def algorithms_of(self, collective: str) -> list[str]:
        """Algorithms of a collective that are timed; auto is our choice among all of them."""
        if self.algorithms == "all":
            return [AUTO, *COLLECTIVES[collective]]
        asked = _listed(self.algorithms)
        known = dict.fromkeys([AUTO, *(name for one in self.names for name in COLLECTIVES[one])])
        for name in asked:
            look_up(known, name, "algorithm of these collectives")
        return [name for name in asked if name == AUTO or name in COLLECTIVES[collective]]

    @property
    def lengths(self) -> list[int]:
        """Bytes of the arrays, the shortest first."""
        if self.sizes is not None:
            return sorted(set(map(read_size, _listed(self.sizes))))
        smallest, largest = read_size(self.smallest), read_size(self.largest)
        if smallest > largest or self.factor < 2:
            raise ConfigError(
                f"smallest must not exceed largest and factor must be at least 2; they are "
                f"{self.smallest}, {self.largest} and {self.factor}"
            )
        found = [smallest]
        while found[-1] * self.factor <= largest:
            found.append(found[-1] * self.factor)
        return found


def read_size(text: str) -> int:
    """Bytes: ``4096``, ``16KiB``, ``0.5MiB``."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMG]iB|B|)", text.strip())
    nbytes = float(match[1]) * _UNITS[match[2]] if match else 0.0
    if not (1 <= nbytes <= _MOST_BYTES and nbytes.is_integer()):
        raise ConfigError(f"size {text!r} is not understood; write bytes, or 16KiB, 4MiB, 1GiB")
    return int(nbytes)


def size_name(nbytes: int) -> str:
    """``16 KiB``; bytes where no unit divides them."""
    for unit in ("GiB", "MiB", "KiB"):
        if nbytes and nbytes % _UNITS[unit] == 0:
            return f"{nbytes // _UNITS[unit]} {unit}"
    return f"{nbytes:,} B"


def _listed(text: str) -> list[str]:
    names = list(dict.fromkeys(_stripped(text.split(","))))
    if not names:
        raise ConfigError(f"a list of names with commas between is needed, not {text!r}")
    return names


def _stripped(words: Iterable[str]) -> list[str]:
    return [word.strip() for word in words if word.strip()]
