"""Selection: which algorithm carries out a call of a group, and the spec its ranks must agree on.

A name at the call counts before one among the settings, and that before the automatic choice. All
that is looked at is the same on all ranks, so that all choose alike.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from mpmp.comm.buffer import wire_dtype
from mpmp.comm.spec import Spec
from mpmp.config import Comm
from mpmp.errors import ConfigError
from mpmp.programs import collectives
from mpmp.programs.choose import choose
from mpmp.programs.partition import partition
from mpmp.programs.steps import Algorithm
from mpmp.programs.windows import WindowAlgorithm

FREELY_CUT = ("allreduce", "reduce", "broadcast")
"""Collectives to which it is all the same where chunks end."""
ROOTED = ("broadcast", "reduce", "gather", "scatter")
REDUCING = ("allreduce", "reduce", "reduce_scatter")

_MOST_KNOWN = 1024


@dataclass(frozen=True, slots=True)
class Call:
    """What a spec is made of: a collective as it was asked for; the key of what was found."""

    collective: str
    dtype: torch.dtype
    """Of the tensor; partial sums of 16-bit floats travel in float32."""
    lengths: tuple[int, ...]
    """Elements of each rank's piece; of the whole, where the chunks are the program's affair."""
    op: str = "sum"
    algorithm: str | None = None
    root: int | None = None
    order: str = "any"

    @property
    def total(self) -> int:
        """Elements of the whole vector (of an all-to-all: of a rank's input)."""
        return sum(self.lengths)

    @property
    def nbytes(self) -> int:
        return self.total * self.dtype.itemsize


class Selection:
    """What a group knows about itself when it chooses."""

    def __init__(
        self, settings: Comm, name: str, rank: int, hosts: tuple[int, ...], table: Any
    ) -> None:
        self._settings, self._name, self._rank, self._table = settings, name, rank, table
        self._hosts, self._size = hosts, len(hosts)
        self._known: dict[tuple[Call, str], Spec] = {}

    def spec(self, call: Call, no_windows: str) -> Spec:
        """The spec of a call; ``no_windows`` says why it cannot use windows, "" where it can."""
        known = self._known.get((call, no_windows))
        if known is not None:
            return known
        name, reason = self._choose(call, shared=not no_windows)
        algorithm = collectives.find(call.collective, name)
        if isinstance(algorithm, WindowAlgorithm) and no_windows:
            raise ConfigError(
                f'{call.collective} algorithm "{name}" works in memory that ranks share, which '
                f"group {self._name} cannot do here: {no_windows}"
            )
        facts = algorithm.taken(self._facts(call))
        dtype = call.dtype  # a window sums 16-bit floats where they lie
        if not isinstance(algorithm, WindowAlgorithm):
            dtype = wire_dtype(dtype, reduces=call.collective in REDUCING)
        bounds = _bounds(call, algorithm.num_chunks(self._size, **facts), self._size)
        if call.root is not None:
            facts["root"] = call.root
        told = tuple(sorted(facts.items()))
        given = None if dtype == call.dtype else call.dtype
        spec = Spec(call.collective, name, dtype, bounds, call.op, told, call.order, given)
        if self._settings.explain and self._rank == 0 and self._size > 1:
            self._explain(call, name, reason)
        if len(self._known) >= _MOST_KNOWN:
            self._known.clear()
        self._known[call, no_windows] = spec
        return spec

    def _choose(self, call: Call, *, shared: bool) -> tuple[str, str]:
        """Name of the algorithm, and why."""
        if call.order not in ("any", "fixed"):
            raise ConfigError(f'no order "{call.order}"; known: any, fixed')
        setting = getattr(self._settings, call.collective)
        for asked, reason in (
            (call.algorithm, "asked for at the call"),
            (setting, f"set by --comm.{call.collective}"),
        ):
            if asked is not None and asked != "auto":
                if call.order == "fixed":
                    _require_fixed(call.collective, asked)
                return asked, reason
        choice = choose(
            call.collective,
            self._size,
            call.nbytes,
            hosts=self._hosts,
            shared=shared,
            table=self._table,
            order=call.order,
            even=max(call.lengths) - min(call.lengths) <= 1,
        )
        return choice.algorithm, choice.reason

    def _facts(self, call: Call) -> dict[str, Any]:
        facts: dict[str, Any] = {"hosts": self._hosts, "segments": segments(call.nbytes)}
        if call.root is not None:
            facts["root"] = call.root
        return facts

    def _explain(self, call: Call, name: str, reason: str) -> None:
        dtype = str(call.dtype).removeprefix("torch.")
        print(
            f"{self._name} ({self._size} ranks): {call.collective} of {call.nbytes:,} B {dtype}: "
            f"{name}, {reason}",
            file=sys.stderr,
            flush=True,
        )


def segments(nbytes: int) -> int:
    """Into how many pieces a pipeline cuts ``nbytes``: of 64 KiB each, of 256 KiB from 4 MiB on."""
    piece = 64 * 1024 if nbytes < 4 << 20 else 256 * 1024
    return max(1, nbytes // piece)


def _bounds(call: Call, num_chunks: int, size: int) -> tuple[int, ...]:
    """Where the chunks of the buffer end, in elements."""
    if call.collective in FREELY_CUT or call.collective == "barrier":
        cuts = partition(call.total, num_chunks)
        return (0, *(stop for _, stop in cuts))
    lengths: Sequence[int] = call.lengths
    if call.collective == "alltoall":  # the input, then the output
        lengths = (*lengths, *lengths)
    assert len(lengths) == num_chunks, f"{call.collective} of {size} ranks in {num_chunks} chunks"
    return (0, *accumulate(lengths))


def _require_fixed(collective: str, name: str) -> None:
    table = collectives.COLLECTIVES[collective]
    algorithm: Algorithm | WindowAlgorithm = collectives.find(collective, name)
    if not algorithm.fixed_order:
        able = [other for other, one in table.items() if one.fixed_order]
        raise ConfigError(
            f'{collective} algorithm "{name}" does not sum in rank order; with order="fixed" take '
            f"{' or '.join(able) or 'another collective'}"
        )
