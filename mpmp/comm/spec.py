"""The spec of a collective: all that the ranks of a group must agree on, and the key of a plan."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

_SHOWN_CHUNKS = 8


@dataclass(frozen=True, slots=True)
class Spec:
    """A collective on a buffer whose chunks have been given their elements."""

    collective: str
    algorithm: str
    dtype: torch.dtype
    """What travels."""
    bounds: tuple[int, ...]
    """Element offsets of the chunks, from 0 to the length of the buffer."""
    op: str = "sum"
    """Name of the reduction; a function's module and name."""
    facts: tuple[tuple[str, Any], ...] = ()
    """What the program is told besides rank and size: root, hosts, segments."""
    order: str = "any"
    given: torch.dtype | None = None
    """Of the ranks' tensors, where what travels is wider."""

    def __str__(self) -> str:
        told = ", ".join(f"{name} {value}" for name, value in self.facts)
        given = "" if self.given is None else f"{_short(self.given)} in "
        fixed = " in fixed order" if self.order == "fixed" else ""
        return (
            f"{self.collective}/{self.algorithm}/{self.op}{fixed} of "
            f"{given}{_short(self.dtype)} {self._chunks()}" + (f" ({told})" if told else "")
        )

    def _chunks(self) -> str:
        sizes = [stop - start for start, stop in pairwise(self.bounds)]
        if len(sizes) <= _SHOWN_CHUNKS:
            return f"chunks {sizes}"
        return f"chunks {sizes[:_SHOWN_CHUNKS]} and so on, {len(sizes)} of {self.bounds[-1]} in all"

    @property
    def nbytes(self) -> int:
        return self.bounds[-1] * self.dtype.itemsize

    @property
    def digest(self) -> bytes:
        """SHA-256 of everything in it, the same on every rank that means the same."""
        return hashlib.sha256(repr(self).encode()).digest()


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
