"""Windows in GPU memory: the ranks of a host read and write each other's tensors by CUDA IPC.

    rank 0   fence . arrive . sum of segment 0, into all windows . settle . barrier
    rank 1   fence . arrive . sum of segment 1, into all windows . settle . barrier

*fence*: the host waits for the stream that produces the tensor. *arrive*: an allgather of one line
a rank, where its tensor lies and what it wants; after it all tensors are complete, and where ranks
want different things all of them raise. *sum*: one pass of the kernel over this rank's segment of
every window. *settle*: the host waits for the kernel. *barrier*: all segments are there, and nobody
reads this rank's window any more. MPI carries a few bytes, and no kernel waits for another rank: a
rank that dies leaves no GPU hanging.

A tensor of the pool is summed where it lies. Any other passes through a *slot* of the pool, in
pieces (``device_pieces.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from mpmp.comm.buffer import DTYPES
from mpmp.comm.device_memory import HANDLE_BYTES, CardError, Place, Pool
from mpmp.comm.device_pieces import Copy, Shown, Span, Sum
from mpmp.comm.mpi import MPI
from mpmp.comm.progress import Handle, Progress
from mpmp.comm.reductions import Reduction
from mpmp.comm.spec import Spec
from mpmp.errors import LaunchError, TensorError

if TYPE_CHECKING:
    from mpmp.comm.world import World

SUMMED = (torch.float32, torch.float16, torch.bfloat16)
"""What the kernel adds; gathered and broadcast is every dtype."""

_NOWHERE = Place(-1, 0)


class DeviceWindows:
    """The windows of one group, whose ranks share a host, on one communicator."""

    def __init__(
        self, world: World, comm: MPI.Intracomm, ranks: tuple[int, ...], name: str, pool: Pool
    ) -> None:
        self.world, self.comm, self.ranks, self.name = world, comm, ranks, name
        self.pool, self.card = pool, pool.card
        self.behind: DeviceWindows | None = None
        """The same on the communicator of what ``progress`` drives."""
        self.progress = Progress(world.until, threaded=False)
        self._blocks: list[list[int]] = [[] for _ in ranks]  # every rank's, by their addresses here
        self._slot: Tensor | None = None
        self._signatures: dict[tuple[Spec, torch.dtype], int] = {}

    def drive_by(self, progress: Progress, comm: MPI.Intracomm) -> None:
        """Leave what is started to ``progress``, on a communicator that nothing else uses."""
        self.progress = progress
        self.behind = DeviceWindows(
            self.world, comm, self.ranks, f"{self.name} (started)", self.pool
        )
        self.behind._blocks = [list(addresses) for addresses in self._blocks]

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor | None:
        """A tensor in this rank's window; None where it has no elements or the GPU no room."""
        return self.pool.empty(shape, dtype)

    def takes(self, spec: Spec, x: Tensor) -> bool:
        """Whether such a tensor can go by windows; all ranks find the same."""
        if spec.collective in ("allgather", "broadcast"):
            return True
        summing = spec.collective in ("allreduce", "reduce_scatter") and spec.op in ("sum", "avg")
        return summing and x.dtype in SUMMED

    def carry_out(
        self,
        spec: Spec,
        reduction: Reduction,
        x: Tensor,
        at: int,
        result: Tensor,
        start: int,
        *,
        background: bool = False,
    ) -> None:
        """Put ``x`` into the whole at element ``at``, run, fill ``result`` from ``start`` on.

        Sums go in the order of the ranks and are alike on all of them to the last bit. On return
        any stream may read ``result`` and write ``x``.
        """
        kind = Sum if spec.collective in ("allreduce", "reduce_scatter") else Copy
        call: Sum | Copy = kind(self, spec, reduction, x, at, result, start)

        def said() -> str:
            others = [rank for rank in self.ranks if rank != self.world.rank]
            return f"ranks {others} in {spec.collective}/ipc on group {self.name}"

        shown: list[Shown] = []
        piece, pieces = 0, 1
        while piece < pieces:
            call.fill(piece)
            self.fence()
            if piece == 0:
                shown = self.arrive(spec, x.dtype, call, said, background)
                pieces = call.pieces.count(shown)
            else:
                self.barrier(said, background)
            call.work(piece, shown)
            self.settle()
            self.barrier(said, background)
            call.take_out(piece)
            piece += 1
        if call.slot is not None:
            self.settle()  # the next call may come on another stream and fill the slot

    def prepare(
        self, spec: Spec, reduction: Reduction, x: Tensor, places: tuple[Span, Span]
    ) -> PreparedCall:
        """A collective in place on memory that stays; ``places`` are of its input and output."""
        return PreparedCall(self, spec, reduction, x, places)

    def slot(self, length: int, dtype: torch.dtype) -> Tensor:
        """Memory of the pool for one piece, the same for every call that needs no more."""
        nbytes = length * dtype.itemsize
        if self._slot is None or self._slot.numel() < nbytes:
            self._slot = None
            self._slot = self.pool.empty((nbytes,), torch.uint8)
            if self._slot is None:
                raise TensorError(f"no room for a slot of {nbytes} B on {self.card.device}")
        return self._slot[:nbytes].view(dtype)

    # --- the order of things --------------------------------------------------------------------

    def fence(self) -> None:
        """Wait for the stream that produces the tensor: MPI, and so the peers, know no streams."""
        self.card.wait()

    def settle(self) -> None:
        """Wait for what this rank's kernel writes to the peers."""
        self.card.wait()

    def barrier(self, said: Callable[[], str], background: bool) -> None:
        self.world.wait([self.comm.Ibarrier()], said, peers=[self.ranks], background=background)

    def arrive(
        self,
        spec: Spec,
        dtype: torch.dtype,
        call: Sum | Copy,
        said: Callable[[], str],
        background: bool,
    ) -> list[Shown]:
        """Say where this rank's tensor lies, and hear it of all."""
        place = (self.pool.place(call.home) if call.home is not None else None) or _NOWHERE
        known = len(self.pool.blocks)
        line = [
            self._signature(spec, dtype),
            known,
            call.slot is not None,
            place.block,
            place.offset,
        ]
        lines = np.empty((self.comm.size, len(line)), dtype=np.int64)
        request = self.comm.Iallgather(np.array(line, dtype=np.int64), lines)
        self.world.wait([request], said, peers=[self.ranks], background=background)
        if (lines[:, 0] != line[0]).any():
            self._disagree(spec, dtype)
        if any(lines[peer, 1] > len(self._blocks[peer]) for peer in range(self.comm.size)):
            self.meet(known)
        shown = []
        for peer, (_, _, slotted, block, offset) in enumerate(lines.tolist()):
            address = self._blocks[peer][block] + offset if block >= 0 else 0
            shown.append(Shown(address, bool(slotted)))
        return shown

    def meet(self, known: int) -> None:
        """Open the blocks of the peers that are new; a CardError on all ranks where one cannot."""
        rank = self.comm.rank
        new = self.pool.blocks[len(self._blocks[rank]) : known]
        texts = self.world.gather_texts("".join(one.handle.hex() for one in new), self.comm)
        refused = ""
        for peer, text in enumerate(texts):
            raw = bytes.fromhex(text)
            try:
                for first in range(0, len(raw), HANDLE_BYTES):
                    handle = raw[first : first + HANDLE_BYTES]
                    own = new[first // HANDLE_BYTES].address if peer == rank else None
                    address = self.card.open(handle) if own is None else own
                    self._blocks[peer].append(address)
            except CardError as error:
                refused = refused or f"memory of rank {self.ranks[peer]} cannot be opened: {error}"
        said = [text for text in self.world.gather_texts(refused, self.comm) if text]
        if said:
            raise CardError(said[0])

    def _signature(self, spec: Spec, dtype: torch.dtype) -> int:
        if (spec, dtype) not in self._signatures:
            if len(self._signatures) >= 1024:
                self._signatures.clear()
            digest = int.from_bytes(spec.digest[:7], "little")
            self._signatures[spec, dtype] = digest * 64 + DTYPES.index(dtype)
        return self._signatures[spec, dtype]

    def _disagree(self, spec: Spec, dtype: torch.dtype) -> None:
        texts = self.world.gather_texts(f"{spec} out of {dtype}", self.comm)
        said = "; ".join(f"rank {self.ranks[rank]}: {text}" for rank, text in enumerate(texts))
        raise TensorError(f"the ranks of group {self.name} disagree on what to do: {said}")


class PreparedCall:
    """A collective in place on memory that stays: ``run`` it, or ``start`` it and wait later.

    ``input`` is the part of ``x`` that this rank contributes, ``output`` the part that it fills.
    """

    def __init__(
        self,
        windows: DeviceWindows,
        spec: Spec,
        reduction: Reduction,
        x: Tensor,
        places: tuple[Span, Span],
    ) -> None:
        self._windows, self.spec, self._reduction = windows, spec, reduction
        (self._at, end), (self._begin, stop) = places
        self.input, self.output = x[self._at : end], x[self._begin : stop]
        # A stream of its own: on the common one the sum would wait for all of backward.
        self._stream = torch.cuda.Stream(x.device)  # type: ignore[no-untyped-call]

    def run(self) -> None:
        """Carry it out on what is in the memory now."""
        self._carry_out(self._windows, background=False)

    def start(self) -> Handle:
        """Start it on what is in the memory now; wait for the handle before reading there."""
        windows = self._windows.behind
        if windows is None:
            raise LaunchError("these windows were opened for calls that are waited for at once")
        produced = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        torch.cuda.current_stream(self.input.device).record_event(produced)

        def work() -> None:
            with torch.cuda.stream(self._stream):
                produced.synchronize()
                self._carry_out(windows, background=True)

        return self._windows.progress.start(work)

    def free(self) -> None:
        """Nothing but the memory itself is held."""

    def _carry_out(self, windows: DeviceWindows, *, background: bool) -> None:
        windows.carry_out(
            self.spec,
            self._reduction,
            self.input,
            self._at,
            self.output,
            self._begin,
            background=background,
        )
