"""Contributions: what lies in every chunk of every rank, followed without a number.

Of each chunk on each rank (a *cell*) four things are kept while the rounds pass:

- which ranks' contributions are in it, and which of them more than once, as sets of bits;
- its origin: which chunk of the input it is, or MIXED where different ones were combined;
- a fingerprint of the order in which it was combined. Combining depends on order and nesting, so
  two cells with one fingerprint hold the same bits, whatever is combined and however it rounds;
- the round in which it was last written.

The sets of all ranks together would take p/4 bytes a cell (512 MiB for 1024 ranks and as many
chunks), so the rounds are followed several times, each for some of the contributing ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpmp.programs.exchange import Exchange, Vector, spread

MIXED = -1
"""The origin of a chunk in which different chunks of the input were combined."""

Bits = NDArray[np.uint64]
"""[cell, word]: 64 contributors a word. Fingerprints are [cell]."""

_WORD = 64
_BYTES_OF_SETS = 1 << 26

OFTEN = ("without", "with", "more than once with")


@dataclass(frozen=True, slots=True)
class Moves:
    """One round as copies between cells, in the order in which a rank combines them.

    Row i reads cell ``source[i]`` as it was when the round began and puts it into cell
    ``target[i]``. The rows are cut into ``layers``; each has a target once. The first overwrites,
    the others combine; a rank's own content stands among them at the place of its rank.
    """

    target: Vector
    source: Vector
    layers: list[slice]

    @classmethod
    def of(cls, exchange: Exchange, num_chunks: int) -> Moves:
        """The rows of ``exchange``, chunk by chunk."""
        count = exchange.count
        source = spread(exchange.sender * num_chunks + exchange.sent, count)
        target = spread(exchange.receiver * num_chunks + exchange.put, count)
        own = np.unique(target[np.repeat(exchange.combines, count)])
        if not len(own):
            return cls(target, source, [slice(0, len(target))])
        # Cells of lower ranks have lower numbers: this is the order of the ranks.
        target, source = np.concatenate((target, own)), np.concatenate((source, own))
        in_order = np.lexsort((source, target))
        target, source = target[in_order], source[in_order]
        first = np.flatnonzero(np.diff(target, prepend=-1))
        place = spread(np.zeros_like(first), np.diff(first, append=len(target)))
        by_place = np.argsort(place, kind="stable")
        ends = np.cumsum(np.bincount(place)).tolist()
        layers = [slice(*pair) for pair in zip([0, *ends[:-1]], ends, strict=True)]
        return cls(target[by_place], source[by_place], layers)


class Contents:
    """The cells of ``size`` ranks after all rounds; see the top of this file."""

    def __init__(self, exchanges: Sequence[Exchange], size: int, num_chunks: int) -> None:
        self.size, self.num_chunks = size, num_chunks
        self.cells = size * num_chunks
        self._rounds = [Moves.of(exchange, num_chunks) for exchange in exchanges]

    def origins(self, start: Vector) -> Vector:
        """The origin of every cell at the end, where it was ``start`` [cell] at the beginning."""
        origin = start.copy()
        for moves in self._rounds:
            read = origin[moves.source]
            for number, layer in enumerate(moves.layers):
                cells, new = moves.target[layer], read[layer]
                origin[cells] = np.where(origin[cells] == new, new, MIXED) if number else new
        return origin

    def orders(self) -> Bits:
        """The fingerprint of every cell at the end."""
        order = fingerprints(np.arange(self.size)).repeat(self.num_chunks)
        for moves in self._rounds:
            read = order[moves.source]
            for number, layer in enumerate(moves.layers):
                cells, new = moves.target[layer], read[layer]
                order[cells] = combined(order[cells], new) if number else new
        return order

    def last_write(self, cell: int) -> str:
        """The beginning of the sentence about a cell that ends wrong."""
        rank, chunk = divmod(cell, self.num_chunks)
        for number in reversed(range(len(self._rounds))):
            if (self._rounds[number].target == cell).any():
                return f"rank {rank}, round {number}: chunk {chunk} is written last and ends"
        return (
            f"rank {rank}, round {len(self._rounds)} (the end): chunk {chunk} was never written "
            "and ends"
        )

    def sets(self) -> Iterator[tuple[range, Bits, Bits]]:
        """For some contributors after others: in which cells they are, and where more than once."""
        words = max(1, _BYTES_OF_SETS // (16 * self.cells))
        for first in range(0, self.size, words * _WORD):
            ranks = range(first, min(first + words * _WORD, self.size))
            yield ranks, *self._follow_sets(ranks)

    def _follow_sets(self, ranks: range) -> tuple[Bits, Bits]:
        words = -(-len(ranks) // _WORD)
        once: Bits = np.zeros((self.cells, words), np.uint64)
        first, stop = ranks.start * self.num_chunks, ranks.stop * self.num_chunks
        once[first:stop] = bits_of(np.arange(len(ranks)).repeat(self.num_chunks), words)
        twice = np.zeros_like(once)
        for moves in self._rounds:
            read, read_twice = once[moves.source], twice[moves.source]
            for number, layer in enumerate(moves.layers):
                cells, new, new_twice = moves.target[layer], read[layer], read_twice[layer]
                if number:
                    had = once[cells]
                    new_twice = new_twice | twice[cells] | (had & new)
                    new = new | had
                once[cells], twice[cells] = new, new_twice
        return once, twice


def bits_of(members: NDArray[Any], words: int) -> Bits:
    """[..., word]: the set that holds one member alone; an empty one for a member below 0."""
    bits = np.zeros((*members.shape, words), np.uint64)
    bit = np.left_shift(np.uint64(1), (members % _WORD).astype(np.uint64))
    inside = (members >= 0) & (members < words * _WORD)
    where = np.nonzero(inside)
    bits[(*where, members[where] // _WORD)] = bit[where]
    return bits


def fingerprints(ranks: Vector) -> Bits:
    """One for each rank's own content."""
    return _mixed(ranks.astype(np.uint64) + np.uint64(1))


def combined(lower: Bits, higher: Bits) -> Bits:
    """The fingerprint of combining two contents, the lower rank's first."""
    return _mixed(_mixed(lower) + (higher ^ (higher << np.uint64(7))))


def _mixed(bits: Bits) -> Bits:
    """Spread all bits over all bits (the finaliser of splitmix64, Steele et al. 2014)."""
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: Bits = bits ^ (bits >> np.uint64(31))
    return mixed
