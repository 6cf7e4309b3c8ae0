"""Lists of tensors that travel as one: copied into one buffer for each dtype, and back.

Many short vectors cost as many times the latency; one long one costs it once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mpmp.comm.progress import Handle
from mpmp.comm.started import Replay


def by_dtype(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """The tensors that have a dtype in common, each as one dim, in the order of appearance."""
    found: dict[torch.dtype, list[Tensor]] = {}
    for one in tensors:
        found.setdefault(one.dtype, []).append(one.view(-1))
    return list(found.values())


def split(flat: Tensor, members: Sequence[Tensor]) -> None:
    """Copy a buffer back to where its parts came from."""
    for one, part in zip(members, torch.split(flat, [len(one) for one in members]), strict=True):
        one.copy_(part)


class PreparedList:
    """A collective on tensors that stay, in place, as one vector for each dtype."""

    def __init__(self, tensors: Sequence[Tensor], prepare: Callable[[Tensor], Replay]) -> None:
        self._parts: list[tuple[Replay, Tensor, list[Tensor]]] = []
        for members in by_dtype(tensors):
            flat = torch.cat(members)
            self._parts.append((prepare(flat), flat, members))

    def run(self) -> None:
        """Carry it out on what is in the tensors now, in this thread."""
        for prepared, flat, members in self._parts:
            torch.cat(members, out=flat)
            prepared.run()
            split(flat, members)

    def start(self) -> Handle:
        """Start it on what is in the tensors now; wait for the handle before reading them."""
        handles = []
        for prepared, flat, members in self._parts:
            torch.cat(members, out=flat)
            handles.append((prepared.start(), flat, members))
        return _StartedList(handles)

    def free(self) -> None:
        for prepared, _, _ in self._parts:
            prepared.free()


class _StartedList:
    def __init__(self, handles: list[tuple[Handle, Tensor, list[Tensor]]]) -> None:
        self._handles = handles

    def wait(self) -> float:
        waited = 0.0
        for handle, flat, members in self._handles:
            waited += handle.wait()
            split(flat, members)
        self._handles = []
        return waited
