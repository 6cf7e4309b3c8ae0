"""Plans: a program lowered for one rank, its chunks given their elements, still without memory.

    round   Send(0, to=2) Send(2, to=2) Reduce(1, source=0)
    message 2 <- elements 0..9, 20..29      what goes to one peer is one message of several spans
    pieces  2 <- 0..9, 20..24 | 25..29      long messages are cut; both ends cut at the same bytes
    waves   |---- wave 0 ----|- wave 1 -|   the n-th pieces of all messages of the round

While one wave is combined the next ones are under way. A piece is received straight into the
buffer where no send of the round reads there; else it lands in scratch and is put into the buffer
once nothing that is still to be sent needs what stands there. What several ranks contribute to an
element is combined in the order of the ranks, this rank's own at its own place.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from mpmp.comm.spec import Spec
from mpmp.programs import collectives
from mpmp.programs.steps import NONE, Algorithm, Reduce, Round, Send

__all__ = ["Plan", "Spec", "lower"]

PIECE_BYTES = 2 << 20
"""Longest request. Each wave is a meeting of all its ranks: the fewer the better where ranks share
cores, as long as what is combined while the next is under way still lies in the cache."""
DEPTH = 2
"""Waves under way at once."""

Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Piece:
    """What one request carries: spans of the buffer, or elements of scratch from ``scratch`` on."""

    peer: int
    sends: bool
    spans: tuple[Span, ...]
    length: int
    scratch: int | None


@dataclass(frozen=True, slots=True)
class Put:
    """What arrived for the elements [start, stop) of the buffer: offsets into scratch.

    ``parts`` are in the order of the ranks, None is what the buffer holds; one part is a copy.
    """

    start: int
    stop: int
    parts: tuple[int | None, ...]


@dataclass(frozen=True, slots=True)
class Wave:
    """Requests that are waited for together, and what is put into the buffer then."""

    pieces: tuple[Piece, ...]
    puts: tuple[Put, ...]


@dataclass(frozen=True, slots=True)
class Exchange:
    """A round in which this rank has something to do."""

    number: int
    waves: tuple[Wave, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """A program lowered for one rank."""

    title: str
    exchanges: tuple[Exchange, ...]
    length: int
    """Elements of the buffer."""
    scratch_length: int


def lower(spec: Spec, rank: int, size: int) -> Plan:
    """Follow a program for one rank and give its chunks their elements."""
    algorithm = collectives.find(spec.collective, spec.algorithm)
    assert isinstance(algorithm, Algorithm)
    step = max(1, PIECE_BYTES // spec.dtype.itemsize)
    exchanges, scratch = [], 0
    rounds = algorithm.program(rank, size, **algorithm.taken(dict(spec.facts)))
    for number, one in enumerate(rounds):
        waves, needed = _lower_round(one, spec.bounds, rank, step)
        if waves:
            exchanges.append(Exchange(number, waves))
            scratch = max(scratch, needed)
    title = f"{spec.collective}/{spec.algorithm}"
    return Plan(title, tuple(exchanges), spec.bounds[-1], scratch)


class _Stretch(NamedTuple):
    """Part of a message; ``reduces`` where it is combined with what the buffer holds."""

    start: int
    stop: int
    reduces: bool


class _Arrival(NamedTuple):
    """Part of a piece that waits in scratch: wave of the piece, and its place in that wave."""

    start: int
    stop: int
    reduces: bool
    source: int
    wave: int
    place: int


def _lower_round(
    one: Round, bounds: tuple[int, ...], rank: int, step: int
) -> tuple[tuple[Wave, ...], int]:
    """The waves of a round, and the elements of scratch they need."""
    sends, takes = _messages(one, bounds)
    sent = [list(_cut(message, step)) for message in sends.values()]
    reading = _Reading(sent)
    taken = {source: list(_cut(message, step)) for source, message in takes.items()}
    num_waves = max((len(pieces) for pieces in [*sent, *taken.values()]), default=0)
    pieces: list[list[Piece]] = [[] for _ in range(num_waves)]
    for to, cut in zip(sends, sent, strict=True):
        for wave, part in enumerate(cut):
            pieces[wave].append(_piece(to, True, part, None))
    arrivals: list[_Arrival] = []
    landing: list[tuple[int, int, list[_Stretch], int]] = []
    used = [0] * num_waves
    for source, cut in taken.items():
        # One place for a whole message: the wire does not know where its parts end up.
        aside = any(s.reduces or reading.last(s) >= 0 for part in cut for s in part)
        for wave, part in enumerate(cut):
            if not aside:
                pieces[wave].append(_piece(source, False, part, None))
                continue
            landing.append((wave, source, part, used[wave]))
            for stretch in part:
                arrivals.append(_Arrival(*stretch, source, wave, used[wave]))
                used[wave] += stretch.stop - stretch.start
    puts, slots = _order(arrivals, reading, rank, num_waves)
    slot = max(used, default=0)
    for wave, source, part, place in landing:
        pieces[wave].append(_piece(source, False, part, wave % slots * slot + place))
    done: list[list[Put]] = [[] for _ in range(num_waves)]
    for wave, start, stop, parts in puts:
        places = tuple(
            None if part is None else part.wave % slots * slot + part.place + start - part.start
            for part in parts
        )
        done[wave].append(Put(start, stop, places))
    waves = tuple(Wave(tuple(p), tuple(d)) for p, d in zip(pieces, done, strict=True))
    return waves, slot * slots


def _messages(
    one: Round, bounds: tuple[int, ...]
) -> tuple[dict[int, list[_Stretch]], dict[int, list[_Stretch]]]:
    """What goes to, and what comes from, each peer, in the order of the steps."""
    sends: dict[int, list[_Stretch]] = {}
    takes: dict[int, list[_Stretch]] = {}
    for step in one.steps:
        peer = int(step.to if isinstance(step, Send) else step.source)
        if peer == NONE:
            continue
        chunk = int(step.chunk)
        start, stop = bounds[chunk], bounds[chunk + int(step.count)]
        if start == stop:
            continue
        message = (sends if isinstance(step, Send) else takes).setdefault(peer, [])
        message.append(_Stretch(start, stop, isinstance(step, Reduce)))
    return sends, takes


def _cut(message: list[_Stretch], step: int) -> Iterator[list[_Stretch]]:
    """A message in pieces of ``step`` elements, adjacent stretches joined."""
    piece: list[_Stretch] = []
    room = step
    for start, stop, reduces in message:
        while start < stop:
            end = min(stop, start + room)
            if piece and piece[-1].stop == start and piece[-1].reduces == reduces:
                piece[-1] = _Stretch(piece[-1].start, end, reduces)
            else:
                piece.append(_Stretch(start, end, reduces))
            room -= end - start
            start = end
            if room == 0:
                yield piece
                piece, room = [], step
    if piece:
        yield piece


def _piece(peer: int, sends: bool, part: list[_Stretch], scratch: int | None) -> Piece:
    spans = tuple((one.start, one.stop) for one in part)
    return Piece(peer, sends, spans, sum(stop - start for start, stop in spans), scratch)


class _Reading:
    """Which elements the sends of a round read, and in which wave."""

    def __init__(self, sent: list[list[list[_Stretch]]]) -> None:
        read = [
            (stretch.start, stretch.stop, wave)
            for pieces in sent
            for wave, part in enumerate(pieces)
            for stretch in part
        ]
        self._starts, self._stops, self._waves = np.array(read, dtype=np.int64).reshape(-1, 3).T

    def last(self, place: _Stretch | _Arrival) -> int:
        """The last wave that reads any of these elements; -1: none does."""
        overlaps = (self._starts < place.stop) & (place.start < self._stops)
        return int(self._waves[overlaps].max(initial=-1))


def _order(
    arrivals: list[_Arrival], reading: _Reading, rank: int, num_waves: int
) -> tuple[list[tuple[int, int, int, list[_Arrival | None]]], int]:
    """What is put where after which wave, and how many waves scratch must hold at once."""
    cuts = sorted({edge for one in arrivals for edge in (one.start, one.stop)})
    together: dict[Span, list[_Arrival]] = {}
    for one in arrivals:
        inside = cuts[bisect_left(cuts, one.start) : bisect_right(cuts, one.stop)]
        for edge, following in zip(inside, inside[1:], strict=False):
            together.setdefault((edge, following), []).append(one)
    puts, deferred = [], False
    for (start, stop), parts in together.items():
        wave = max(max(reading.last(one) for one in parts), max(one.wave for one in parts))
        deferred = deferred or any(one.wave < wave for one in parts)
        parts.sort(key=lambda one: one.source)
        ordered: list[_Arrival | None] = list(parts)
        if parts[0].reduces:
            ordered.insert(sum(one.source < rank for one in parts), None)
        puts.append((wave, start, stop, ordered))
    return puts, max(1, num_waves if deferred else min(DEPTH, num_waves))
