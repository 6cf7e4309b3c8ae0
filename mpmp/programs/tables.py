"""Names in tables: what is found under a name, and the sentence for a name that is unknown."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import TypeVar

from mpmp.errors import ConfigError

Entry = TypeVar("Entry")


def look_up(table: Mapping[str, Entry], name: str, what: str) -> Entry:
    """``table[name]``; a ConfigError names the nearest known name and lists them all."""
    if name in table:
        return table[name]
    nearest = get_close_matches(name, table, n=1, cutoff=0)[0]
    raise ConfigError(f'no {what} "{name}"; did you mean "{nearest}"; known: {", ".join(table)}')
