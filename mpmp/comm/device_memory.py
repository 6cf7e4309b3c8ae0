"""Memory of a GPU that the other processes of a host can map: CUDA IPC.

    card.allocate -> address -- card.export -> handle, 64 B -- card.open -> address over there

A block comes from ``cudaMalloc`` itself and not from torch: an IPC handle stands for a whole
allocation, of which torch's allocator shows a part only, and of its expandable segments there are
no handles. torch has no call for it either (``torch.cuda.cudart()`` lacks IPC;
``UntypedStorage._share_cuda_`` counts references in files of /dev/shm, which a killed rank leaves
behind). So the four documented calls of the CUDA runtime are made by ctypes on the library that
torch has loaded, as vLLM and SGLang do; ``__cuda_array_interface__`` makes a tensor of an address.

A block is never freed: the peers have it mapped, and freeing what others map is undefined. What
tensors leave behind is given out again.
"""

from __future__ import annotations

import ctypes
import weakref
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor

HANDLE_BYTES = 64
BLOCK_BYTES = 64 << 20
"""Least size of a block; a longer tensor gets one of its own."""

_GRAIN_BYTES = 512  # as torch's own allocator: every tensor begins at a multiple
_PAGE_BYTES = 2 << 20  # what is shorter shares a page with others, and the handle is the page's
_TO_PEERS_TOO = 1  # cudaIpcMemLazyEnablePeerAccess: memory of another card may be mapped as well
_ANY_WAY = 4  # cudaMemcpyDefault: the addresses tell which card


class CardError(RuntimeError):
    """The CUDA runtime refused a call."""


class _Handle(ctypes.Structure):
    _fields_ = [("bytes", ctypes.c_char * HANDLE_BYTES)]


class Card:
    """One GPU: memory that others can map; copies, sums and waits on the current stream."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._cuda = _runtime()
        self._opened: dict[bytes, int] = {}

    def allocate(self, nbytes: int) -> int:
        address = ctypes.c_void_p()
        self._call("cudaMalloc", ctypes.byref(address), ctypes.c_size_t(nbytes))
        return address.value or 0

    def export(self, address: int) -> bytes:
        """The handle by which another process opens what ``allocate`` gave."""
        handle = _Handle()
        self._call("cudaIpcGetMemHandle", ctypes.byref(handle), ctypes.c_void_p(address))
        return ctypes.string_at(ctypes.byref(handle), HANDLE_BYTES)

    def open(self, handle: bytes) -> int:
        """Map what another process exported; the same handle is mapped once."""
        if handle not in self._opened:
            address = ctypes.c_void_p()
            self._call(
                "cudaIpcOpenMemHandle",
                ctypes.byref(address),
                _Handle.from_buffer_copy(handle),
                ctypes.c_uint(_TO_PEERS_TOO),
            )
            self._opened[handle] = address.value or 0
        return self._opened[handle]

    def tensor(self, lease: Lease) -> Tensor:
        """The leased bytes; their storage keeps the lease."""
        return torch.as_tensor(lease, device=self.device)

    def copy(self, target: int, source: int, nbytes: int) -> None:
        """Queue a copy between addresses, also of other cards."""
        stream = torch.cuda.current_stream(self.device).cuda_stream
        self._call(
            "cudaMemcpyAsync",
            ctypes.c_void_p(target),
            ctypes.c_void_p(source),
            ctypes.c_size_t(nbytes),
            ctypes.c_int(_ANY_WAY),
            ctypes.c_void_p(stream),
        )

    def sum_publish(
        self,
        sources: Sequence[int],
        targets: Sequence[int],
        length: int,
        dtype: torch.dtype,
        divide: float = 1.0,
    ) -> None:
        """Queue the kernel that adds all sources and writes the sum to all targets."""
        from mpmp_kernels import triton_sum_publish  # needs Triton, which only GPUs bring

        triton_sum_publish.sum_publish(sources, targets, length, dtype, self.device, divide)

    def wait(self) -> None:
        """Until all that is on the current stream is done."""
        torch.cuda.current_stream(self.device).synchronize()

    def wait_for_all(self) -> None:
        """Until all streams of this process are done."""
        torch.cuda.synchronize(self.device)

    def _call(self, name: str, *arguments: Any) -> None:
        with torch.cuda.device(self.device):  # a new thread begins with card 0
            code = getattr(self._cuda, name)(*arguments)
            if code:
                self._cuda.cudaGetLastError()  # else torch would find it after its next kernel
                text = self._cuda.cudaGetErrorString(code).decode()
                raise CardError(f"{name} on {self.device}: {text}")


@cache
def _runtime() -> ctypes.CDLL:
    """The CUDA runtime that torch has loaded; a second one would know nothing of its memory."""
    loaded = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
    for file in sorted(loaded):
        if Path(file).name.startswith("libcudart"):
            runtime = ctypes.CDLL(file)
            runtime.cudaGetErrorString.restype = ctypes.c_char_p
            return runtime
    raise CardError("torch has loaded no libcudart of its own")


# --- the pool -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    address: int
    nbytes: int
    handle: bytes


@dataclass(frozen=True)
class Place:
    """Where something lies, as every rank understands it."""

    block: int
    offset: int


@dataclass(eq=False)
class Lease:
    """Some bytes of a block, until their storage dies."""

    address: int
    nbytes: int

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        data = (self.address, False)
        return {"shape": (self.nbytes,), "typestr": "|u1", "data": data, "version": 2}


@dataclass
class Pool:
    """Blocks of one card and what of them is taken."""

    card: Card
    blocks: list[Block] = field(default_factory=list)
    _used: int = 0
    _returned: defaultdict[int, deque[int]] = field(default_factory=lambda: defaultdict(deque))
    _lock: Lock = field(default_factory=Lock)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor | None:
        """A tensor that peers can map, or None where the card has no memory left."""
        length = 1
        for size in shape:
            length *= size
        if length == 0:
            return None
        nbytes = _rounded(length * dtype.itemsize)
        try:
            address = self._take(nbytes)
        except CardError:
            return None
        lease = Lease(address, nbytes)
        # An append is all that a finaliser does: it runs anywhere, inside _take too.
        weakref.finalize(lease, self._returned[nbytes].append, address).atexit = False
        return self.card.tensor(lease).view(dtype)[:length].view(tuple(shape))

    def place(self, x: Tensor) -> Place | None:
        """Where a contiguous tensor lies; None outside of the pool."""
        address = x.data_ptr()
        for number, block in enumerate(self.blocks):
            if block.address <= address < block.address + block.nbytes:
                return Place(number, address - block.address)
        return None

    def _take(self, nbytes: int) -> int:
        with self._lock:
            if self._returned[nbytes]:
                # Its last user's kernels may still be queued, on whatever stream.
                address = self._returned[nbytes].popleft()
                self.card.wait_for_all()
                return address
            if not self.blocks or self._used + nbytes > self.blocks[-1].nbytes:
                size = -(-max(nbytes, BLOCK_BYTES) // _PAGE_BYTES) * _PAGE_BYTES
                address = self.card.allocate(size)
                self.blocks.append(Block(address, size, self.card.export(address)))
                self._used = 0
            self._used += nbytes
            return self.blocks[-1].address + self._used - nbytes


def _rounded(nbytes: int) -> int:
    """Up to the next of eight steps between powers of two, so that what is returned fits again."""
    grain = max(_GRAIN_BYTES, 1 << max(0, (nbytes - 1).bit_length() - 4))
    return -(-nbytes // grain) * grain
