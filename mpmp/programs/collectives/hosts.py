"""Hosts: the groups that the fact ``hosts`` makes of the ranks.

      host      a a a b b       inside: the ranks of one host; between: those with one place;
      place     0 1 2 0 1       leaders: the first rank of each host.

The fullest host comes first, so that its leader is the one with the most to do in a fold.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpmp.errors import ProgramError
from mpmp.programs.collectives.compose import Members
from mpmp.programs.steps import NONE, Ranks, where

Table = NDArray[np.int64]


class Hosts:
    """The hosts of ``size`` ranks as ``rank`` sees them; an empty ``hosts`` is one for all."""

    def __init__(self, rank: Ranks, size: int, hosts: tuple[int, ...]) -> None:
        self._ranks, host_of, place_of = _tables(size, tuple(hosts))
        self.number, self.most = self._ranks.shape
        self.are_even = bool((self._ranks != NONE).all())
        self.host, self.place = _at(host_of, rank), _at(place_of, rank)

    @property
    def inside(self) -> Members:
        return Members(self.place, self.most, lambda place: _at(self._ranks, self.host, place))

    @property
    def between(self) -> Members:
        return Members(self.host, self.number, lambda host: _at(self._ranks, host, self.place))

    @property
    def leaders(self) -> Members:
        leads = where(self.place == 0, self.host, NONE)
        return Members(leads, self.number, lambda host: _at(self._ranks, host, 0))


def _at(table: Table, *index: Ranks) -> Any:
    found = table[index]
    return found if isinstance(found, np.ndarray) else int(found)


@lru_cache(maxsize=16)
def _tables(size: int, hosts: tuple[int, ...]) -> tuple[Table, Table, Table]:
    """[host, place] the rank there or NONE; [rank] its host; [rank] its place."""
    if hosts and len(hosts) != size:
        raise ProgramError(f"the fact hosts speaks of {len(hosts)} ranks and there are {size}")
    members: dict[int, list[int]] = {}
    for rank, host in enumerate(hosts or (0,) * size):
        members.setdefault(host, []).append(rank)
    fullest_first = sorted(members.values(), key=len, reverse=True)
    ranks = np.full((len(fullest_first), len(fullest_first[0])), NONE)
    host_of, place_of = np.zeros(size, np.int64), np.zeros(size, np.int64)
    for host, inside in enumerate(fullest_first):
        ranks[host, : len(inside)] = inside
        host_of[inside], place_of[inside] = host, np.arange(len(inside))
    return ranks, host_of, place_of
