"""Contenders: the same collective, by each of our algorithms, by the MPI library and by gloo.

All are bound to memory of their own before they are timed: ours are prepared and replayed, in place
on one buffer that they share in turns; theirs are called on buffers that stay.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mpmp.comm import native
from mpmp.comm.group import Group
from mpmp.errors import ConfigError
from mpmp.job.bench.baselines import gloo_call
from mpmp.job.bench.collectives import oracle
from mpmp.job.bench.collectives.settings import AUTO, Collectives
from mpmp.programs.partition import partition


@dataclass(frozen=True)
class Task:
    """A collective of ``length`` elements (the whole array) on a group; the root is rank 0."""

    collective: str
    length: int
    dtype: torch.dtype
    group: Group

    @property
    def nbytes(self) -> int:
        return self.length * self.dtype.itemsize

    def buffer(self, placement: str) -> Tensor:
        """Memory for our program: the whole array, of an all-to-all the input and the output."""
        dtype, length = self.dtype, self.length * (2 if self.collective == "alltoall" else 1)
        if self.collective == "barrier":
            dtype, length = torch.uint8, 1
        if placement == "window":
            return self.group.empty((length,), dtype)
        return torch.empty(length, dtype=dtype)

    def places(self) -> tuple[slice, slice]:
        """Where in that buffer this rank's input and its result lie."""
        whole = slice(0, self.length)
        own = slice(*partition(self.length, self.group.size)[self.group.rank])
        if self.collective == "alltoall":
            return whole, slice(self.length, 2 * self.length)
        return (
            own if self.collective in ("allgather", "gather") else whole,
            own if self.collective in ("reduce_scatter", "scatter") else whole,
        )

    def given(self) -> Tensor:
        """What this rank brings, in ordinary memory."""
        rank, size = self.group.rank, self.group.size
        return oracle.given(self.collective, rank, size, self.length, self.dtype)

    def expected(self) -> Tensor | None:
        rank, size = self.group.rank, self.group.size
        return oracle.expected(self.collective, rank, size, self.length, self.dtype)


@dataclass(frozen=True)
class Contender:
    """``call`` works on ``input`` and leaves its result in ``result``."""

    name: str
    call: Callable[[], object]
    input: Tensor
    result: Tensor
    took: str = ""
    """Name of the algorithm that auto is."""
    free: Callable[[], None] = lambda: None

    def num_wrong(self, given: Tensor, right: Tensor | None) -> int:
        """Elements that are wrong after one call, and after a replay."""
        wrong = 0
        for _ in range(2):
            self.input.copy_(given)
            self.call()
            wrong = max(wrong, oracle.num_wrong(self.result, right))
        return wrong

    def clear(self) -> None:
        """Zeros everywhere: a sum in place that is replayed stays what it is."""
        self.input.zero_()
        self.result.zero_()

    def num_strayed(self) -> int:
        """Elements that are not zero any more after calls on zeros."""
        return int(torch.count_nonzero(self.result))


def enter(task: Task, settings: Collectives) -> tuple[list[Contender], dict[str, str]]:
    """Everybody who takes part in a task, in the order of its table, and who cannot and why."""
    found = []
    if "native" in settings.baselines and task.dtype in native.DTYPES:
        found.append(_native(task))
    if "gloo" in settings.baselines:
        found.append(_gloo(task))
    left_out: dict[str, str] = {}
    return found + _ours(task, settings, left_out), left_out


def _native(task: Task) -> Contender:
    x = task.given()
    place = task.places()[1]
    result = x if task.collective == "broadcast" else x.new_zeros(place.stop - place.start)
    return Contender(
        "native", native.native_call(task.group, task.collective, x, result), x, result
    )


def _gloo(task: Task) -> Contender:
    x, group = task.given(), task.group
    call, result = gloo_call(task.collective, x, task.length, group.rank, group.size)
    return Contender("gloo", call, x, result)


def _ours(task: Task, settings: Collectives, left_out: dict[str, str]) -> list[Contender]:
    """Our algorithms, prepared on one buffer; those that cannot run here are left out."""
    x = task.buffer(settings.placement)
    given, result = task.places()
    found = []
    for name in settings.algorithms_of(task.collective):
        asked = None if name == AUTO else name
        try:
            handle = task.group.prepare(task.collective, x, algorithm=asked)
        except ConfigError as error:  # a window where no memory is shared: all ranks know
            if settings.algorithms != "all":
                raise
            left_out[name] = str(error)
            continue
        spec = getattr(handle, "spec", None)
        took = "" if spec is None else spec.algorithm
        found.append(Contender(name, handle.run, x[given], x[result], took, handle.free))
    return found
