"""A group of ranks and what they do together: collectives, started ones, and messages.

Results are new tensors unless ``out`` is given. Tensors are contiguous, detached and of a dtype
that ``buffer`` lists; anything else is refused with a TensorError. All ranks of the group must
make the same calls in the same order.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from mpmp.comm.buffer import admit, load, wire_dtype
from mpmp.comm.executor import Executor
from mpmp.comm.mpi import MPI
from mpmp.comm.plan import Spec
from mpmp.comm.progress import Progress
from mpmp.comm.started import PreparedAllreduce
from mpmp.comm.transfer import Transfer
from mpmp.config import Comm
from mpmp.errors import TensorError
from mpmp.programs import collectives
from mpmp.programs.choose import choose
from mpmp.programs.partition import partition

SLOT_BYTES = 256 * 1024
"""Up to here a copy into a prepared staging slot is cheaper than posting requests anew."""


class Group:
    """Ranks of one axis (or several) of the mesh.

    ``rank`` is this rank's place in the group, ``ranks`` all members by their rank in the world,
    ``spent_s`` the seconds this rank has spent here, waiting included (started operations aside).
    """

    def __init__(
        self, now: Executor, started: Executor, progress: Progress, settings: Comm
    ) -> None:
        self._now, self._started, self._progress, self._settings = now, started, progress, settings
        self.name, self.ranks = now.name, now.ranks
        self.rank, self.size = now.comm.rank, now.comm.size

    def __repr__(self) -> str:
        return f"Group({self.name}, rank {self.rank} of {self.ranks})"

    @property
    def spent_s(self) -> float:
        return self._now.spent_s

    # --- collectives ----------------------------------------------------------------------------

    def allreduce(
        self,
        x: Tensor,
        op: str = "sum",
        algorithm: str | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """The elementwise sum (max, min) over all ranks, on all ranks; any shape."""
        result = torch.empty_like(x) if out is None else out
        if result.shape != x.shape or result.dtype != x.dtype or result.device != x.device:
            raise TensorError(
                f"out is {tuple(result.shape)} of {result.dtype} on {result.device}, "
                f"x is {tuple(x.shape)} of {x.dtype} on {x.device}; they must agree"
            )
        flat, target = admit(x), admit(result)
        spec = self._spec("allreduce", flat, self._even(flat.numel()), op, algorithm)
        self._carry_out(spec, flat, 0, target, 0)
        return result

    def reduce_scatter(self, x: Tensor, op: str = "sum", algorithm: str | None = None) -> Tensor:
        """This rank's piece, along dim 0, of the sum over all ranks.

        ``x`` is (N, ...); rank r gets the rows ``partition(N, size)[r]``.
        """
        flat, rows = admit(x), _rows(x)
        row = flat.numel() // rows if rows else 0
        bounds = [0, *(stop * row for _, stop in partition(rows, self.size))]
        start, stop = bounds[self.rank], bounds[self.rank + 1]
        result = x.new_empty(((stop - start) // row if row else 0, *x.shape[1:]))
        spec = self._spec("reduce_scatter", flat, bounds, op, algorithm)
        self._carry_out(spec, flat, 0, result.view(-1), start)
        return result

    def allgather(
        self, x: Tensor, lengths: Sequence[int] | None = None, algorithm: str | None = None
    ) -> Tensor:
        """All ranks' pieces, one after the other along dim 0, on all ranks.

        ``x`` is (n, ...), ``lengths`` the n of every rank (omitted: all as this rank's).
        """
        flat, rows = admit(x), _rows(x)
        lengths = [rows] * self.size if lengths is None else list(lengths)
        if len(lengths) != self.size or lengths[self.rank] != rows:
            raise TensorError(
                f"allgather of {rows} rows on rank {self.rank} of {self.size} "
                f"does not fit the lengths {lengths}"
            )
        row = 1
        for length in x.shape[1:]:
            row *= length
        bounds = [0, *accumulate(length * row for length in lengths)]
        result = x.new_empty((sum(lengths), *x.shape[1:]))
        spec = self._spec("allgather", flat, bounds, None, algorithm)
        self._carry_out(spec, flat, bounds[self.rank], result.view(-1), 0)
        return result

    def broadcast(self, x: Tensor, root: int = 0, algorithm: str | None = None) -> Tensor:
        """The tensor of rank ``root`` on all ranks; the others bring one of the same shape."""
        if not 0 <= root < self.size:
            raise TensorError(f"root {root} is not a rank of {self}")
        flat, result = admit(x), torch.empty_like(x)
        spec = self._spec("broadcast", flat, self._even(flat.numel()), None, algorithm, root)
        self._carry_out(spec, flat, 0, result.view(-1), 0)
        return result

    def barrier(self) -> None:
        """Return when all ranks have come here, without taking the core from those who compute."""
        self.allreduce(torch.zeros(1))

    # --- started operations -----------------------------------------------------------------------

    def prepare_allreduce(self, x: Tensor, algorithm: str | None = None) -> PreparedAllreduce:
        """A sum over all ranks, in place on memory that stays, to be started many times."""
        flat = admit(x)
        spec = self._spec("allreduce", flat, self._even(flat.numel()), "sum", algorithm)
        return PreparedAllreduce(self._started, self._progress, spec, flat)

    # --- messages ---------------------------------------------------------------------------------

    def send(self, x: Tensor, to: int, tag: int) -> Transfer:
        """Start sending to a rank of the group; ``wait`` before the tensor is written again."""
        return Transfer(self._now, admit(x), to, tag, sends=True)

    def receive(self, out: Tensor, source: int, tag: int) -> Transfer:
        """Start receiving from a rank of the group; ``wait`` before the tensor is read."""
        return Transfer(self._now, admit(out), source, tag, sends=False)

    def stop(self) -> None:
        """End the thread that drives started operations, once they are done."""
        self._progress.stop()

    def free(self) -> None:
        """Give the group's communicators back; nothing of it may be used afterwards."""
        for executor in (self._now, self._started):
            executor.free()

    @property
    def communicator(self) -> MPI.Intracomm:
        """The group's own communicator; for ``native.py``, which measures the library itself."""
        return self._now.comm

    # --- inside -----------------------------------------------------------------------------------

    def _spec(
        self,
        collective: str,
        flat: Tensor,
        bounds: Sequence[int],
        op: str | None,
        algorithm: str | None,
        root: int | None = None,
    ) -> Spec:
        dtype = wire_dtype(flat.dtype, reduces=op is not None)
        asked = algorithm or getattr(self._settings, collective)
        if asked == "auto":
            asked = choose(collective, self.size, bounds[-1] * dtype.itemsize)
        num_chunks = collectives.find(collective, asked).num_chunks(self.size)
        if len(bounds) - 1 != num_chunks:  # allreduce and broadcast do not care where chunks end
            bounds = [0, *(stop for _, stop in partition(bounds[-1], num_chunks))]
        return Spec(collective, asked, dtype, tuple(bounds), op or "sum", root)

    def _even(self, length: int) -> list[int]:
        return [0, *(stop for _, stop in partition(length, self.size))]

    def _carry_out(self, spec: Spec, x: Tensor, at: int, result: Tensor, start: int) -> None:
        """Put ``x`` into a buffer at offset ``at``, run, and fill ``result`` from ``start`` on."""
        began = time.perf_counter()
        staged = x.is_cuda and not self._now.world.cuda_aware
        fits = spec.bounds[-1] * spec.dtype.itemsize <= SLOT_BYTES
        if fits and (staged or not x.is_cuda):
            operation = self._now.slot(spec, pinned=staged)
        else:
            device = "cpu" if staged else x.device
            whole = start == 0 and result.numel() == spec.bounds[-1]
            # The result itself serves as the buffer where it has the right type and place.
            if whole and not staged and result.dtype == spec.dtype:
                buffer = result
            else:
                buffer = torch.empty(
                    spec.bounds[-1], dtype=spec.dtype, device=device, pin_memory=staged
                )
            operation = self._now.bind(spec, buffer, prepared=False)
        load(operation.buffer[at : at + x.numel()], x)
        operation.run()
        load(result, operation.buffer[start : start + result.numel()])
        self._now.spent_s += time.perf_counter() - began


def _rows(x: Tensor) -> int:
    if x.dim() == 0:
        raise TensorError("a tensor without dims cannot be scattered or gathered; give it one")
    return x.shape[0]
