"""The tuning table: what was measured on a machine, for ``choose`` to pick by, and its file.

The file is JSON: a format number, the MPI library that was measured, the fitted links and one
object a measured time. It is read strictly: what is not understood is refused, never guessed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from math import isfinite
from typing import Any

from mpmp.errors import ConfigError
from mpmp.programs.cluster import Link, Links, Memory
from mpmp.programs.collectives import COLLECTIVES, find
from mpmp.programs.tables import look_up

FORMAT = 1
PLACEMENTS = ("window", "ordinary")


@dataclass(frozen=True, slots=True)
class Entry:
    """A measured time of one of our algorithms; ``placement`` says where the tensors lay."""

    collective: str
    ranks: int
    hosts: int
    bytes: int
    algorithm: str
    time_us: float
    placement: str

    def __post_init__(self) -> None:
        look_up(COLLECTIVES, self.collective, "collective")
        find(self.collective, self.algorithm)
        look_up(dict.fromkeys(PLACEMENTS), self.placement, "placement")
        for name, least in (("ranks", 1), ("hosts", 1), ("bytes", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ConfigError(f"an entry needs {name} of at least {least}, not {value!r}")
        if self.hosts > self.ranks:
            raise ConfigError(f"an entry has {self.ranks} ranks on {self.hosts} hosts")
        if not _is_number(self.time_us) or self.time_us <= 0:
            raise ConfigError(f"an entry needs a finite time_us above 0, not {self.time_us!r}")

    @property
    def key(self) -> tuple[str, int, int, int, str, str]:
        """What was measured, without what came out."""
        return (
            self.collective,
            self.ranks,
            self.hosts,
            self.bytes,
            self.algorithm,
            self.placement,
        )


@dataclass(frozen=True, slots=True)
class Table:
    """Measured times under one MPI library, and the links that were fitted to them."""

    library: str
    entries: tuple[Entry, ...] = ()
    links: Links = Links()

    def __post_init__(self) -> None:
        seen = set()
        for entry in self.entries:
            if entry.key in seen:
                raise ConfigError(f"a tuning table has two times of {_told(entry)}")
            seen.add(entry.key)

    def merge(self, newer: Table) -> Table:
        """This table and a newer one, whose times and links count where both have them."""
        if newer.library != self.library:
            raise ConfigError(
                f'a tuning table of "{self.library}" cannot take times of "{newer.library}"; '
                "keep one table a library"
            )
        entries = {entry.key: entry for entry in (*self.entries, *newer.entries)}
        links = {
            field.name: getattr(newer.links, field.name) or getattr(self.links, field.name)
            for field in fields(Links)
        }
        return Table(self.library, tuple(entries.values()), Links(**links))

    def to_json(self) -> str:
        """The table as text that ``from_json`` reads, an entry a line."""
        head = {"format": FORMAT, "library": self.library, "links": asdict(self.links)}
        lines = ",\n".join(f"    {json.dumps(asdict(entry))}" for entry in self.entries)
        text = json.dumps(head, indent=2, allow_nan=False)
        return f'{text[:-2]},\n  "entries": [\n{lines}\n  ]\n}}\n'


def from_json(text: str) -> Table:
    """The table in a text; a ConfigError names the first thing in it that is wrong."""
    try:
        found = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"a tuning table must be JSON: {error}") from None
    if not isinstance(found, dict) or "format" not in found:
        raise ConfigError('a tuning table is a JSON object with a "format"')
    if found["format"] != FORMAT or isinstance(found["format"], bool):
        raise ConfigError(
            f"the tuning table has format {found['format']!r} and this program reads {FORMAT}; "
            "measure again with --table"
        )
    _demand(found, ("format", "library", "links", "entries"), "a tuning table")
    if not isinstance(found["library"], str) or not isinstance(found["entries"], list):
        raise ConfigError('a tuning table needs a text as "library" and a list as "entries"')
    entries = []
    for number, one in enumerate(found["entries"]):
        try:
            _demand(one, _names(Entry), "it")
            entries.append(Entry(**one))
        except (ConfigError, TypeError) as error:
            raise ConfigError(f"entry {number} of the tuning table: {error}") from None
    return Table(found["library"], tuple(entries), _links(found["links"]))


def _links(found: Any) -> Links:
    kinds: dict[str, type[Link] | type[Memory]] = {
        "same_host": Link,
        "other_host": Link,
        "memory": Memory,
    }
    _demand(found, tuple(kinds), "links")
    made: dict[str, Any] = {}
    for name, kind in kinds.items():
        numbers = found[name]
        if numbers is not None:
            _demand(numbers, _names(kind), name)
            if not all(map(_is_number, numbers.values())):
                raise ConfigError(f"{name} of the tuning table needs finite numbers, not {numbers}")
            made[name] = kind(**numbers)
    return Links(**made)


def _demand(found: Any, names: tuple[str, ...], what: str) -> None:
    """Refuse whatever is not an object with exactly these names."""
    if not isinstance(found, Mapping):
        raise ConfigError(f"{what} must be an object with {', '.join(names)}, not {found!r:.40}")
    unknown, missing = found.keys() - set(names), set(names) - found.keys()
    if unknown or missing:
        wrong = f'the unknown "{min(unknown)}"' if unknown else f'no "{min(missing)}"'
        raise ConfigError(f"{what} has {wrong}; it needs {', '.join(names)}")


def _names(kind: type) -> tuple[str, ...]:
    return tuple(field.name for field in fields(kind))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"it has {name} where a number is needed")


def _told(entry: Entry) -> str:
    return (
        f"{entry.collective} {entry.algorithm} with {entry.bytes} bytes on {entry.ranks} ranks of "
        f"{entry.hosts} hosts ({entry.placement})"
    )
