"""Shares: memory that the ranks of one host share, each rank its own piece.

    share of rank 0   [lines, slots | bucket | activation | ...sparse... ]   mapped by all ranks
    share of rank 1   [lines, slots | bucket | ...            sparse... ]    of the host

A share is a file in /dev/shm that never had a name (``O_TMPFILE``): however a rank ends, nothing
is left behind. It is as long as /dev/shm is large, but sparse: memory is taken when something is
allocated, by ``posix_fallocate``, which fails cleanly where there is no room. That is a local
matter: a rank allocates and frees in its own share when it likes, and a tensor's *lease* on its
place is the life of its storage. Whatever saves the tensor for backward keeps the place.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import threading
import weakref
from bisect import insort
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from mpmp.comm.mpi import MPI

FOLDER = "/dev/shm"
PAGE_BYTES = 4096
CURE = "give it more room: docker run --shm-size=8g, or mount -o remount,size=8g /dev/shm"
_MOST_BYTES_OF_ALL = 1 << 45
"""Addresses that all shares of a host together may take in a process; Linux gives 2^47."""


class Heap:
    """Which bytes of a share are taken: first fit, freed neighbours are joined."""

    def __init__(self, descriptor: int, nbytes: int) -> None:
        self._descriptor, self._nbytes = descriptor, nbytes
        self._top = 0
        self._free: list[tuple[int, int]] = []
        self._returned: deque[tuple[int, int]] = deque()
        self._lock = threading.Lock()

    def take(self, nbytes: int) -> int | None:
        """Offset of ``nbytes`` whole pages, or None where there is no room."""
        wanted = max(1, -(-nbytes // PAGE_BYTES)) * PAGE_BYTES
        with self._lock:
            while self._returned:
                self._join(*self._returned.popleft())
            for index, (start, length) in enumerate(self._free):
                if length >= wanted:
                    self._free[index : index + 1] = (
                        [(start + wanted, length - wanted)] if length > wanted else []
                    )
                    return start
            start = self._top
            if self._free and sum(self._free[-1]) == self._top:
                start = self._free[-1][0]  # the last free piece is drawn out
            if start + wanted > self._nbytes:
                return None
            try:
                os.posix_fallocate(self._descriptor, self._top, start + wanted - self._top)
            except OSError:
                return None
            if start < self._top:
                self._free.pop()
            self._top = start + wanted
            return start

    def give_back(self, start: int, nbytes: int) -> None:
        """Free what ``take`` gave; merely noted, for finalisers run anywhere, inside take too."""
        self._returned.append((start, max(1, -(-nbytes // PAGE_BYTES)) * PAGE_BYTES))

    def _join(self, start: int, length: int) -> None:
        insort(self._free, (start, length))
        at = self._free.index((start, length))
        low, high = max(0, at - 1), min(len(self._free), at + 2)
        merged: list[tuple[int, int]] = []
        for first, count in self._free[low:high]:
            if merged and sum(merged[-1]) == first:
                merged[-1] = (merged[-1][0], merged[-1][1] + count)
            else:
                merged.append((first, count))
        self._free[low:high] = merged


class Shares:
    """The shares of all ranks of this host, mapped here; this rank allocates in its own."""

    def __init__(
        self, ranks: Sequence[int], own: int, maps: list[mmap.mmap], heap: Heap, lock: int
    ) -> None:
        self.ranks = tuple(ranks)
        """Ranks of the world on this host."""
        self._maps, self._heap, self._lock = maps, heap, lock
        self._asked = False
        self.base = {
            rank: ctypes.addressof(ctypes.c_char.from_buffer(one))
            for rank, one in zip(ranks, maps, strict=True)
        }
        """Address here of each rank's share."""
        self._start = self.base[own]
        self._stop = self._start + len(maps[0])
        self.kept: list[object] = []
        """What must outlive those who made it here, because other ranks may still read it."""

    def is_first(self) -> bool:
        """Whether no rank of this host has asked before: for what is to be said once."""
        if self._asked:
            return False
        self._asked = True
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # and never given back
        except OSError:
            return False
        return True

    def empty(self, nbytes: int) -> Tensor | None:
        """Uninitialised bytes in this rank's share, or None where there is no room."""
        start = self._heap.take(nbytes)
        if start is None:
            return None
        memory = (ctypes.c_char * max(nbytes, 1)).from_address(self._start + start)
        # The tensor's storage keeps `memory`, and nothing else does.
        weakref.finalize(memory, self._heap.give_back, start, nbytes).atexit = False
        return torch.frombuffer(memory, dtype=torch.uint8)[:nbytes]

    def offset(self, tensor: Tensor) -> int:
        """Where a host tensor lies in this rank's share, or -1."""
        address = tensor.data_ptr()
        return address - self._start if self._start <= address < self._stop else -1


def open_shares(host: MPI.Intracomm, ranks: Sequence[int]) -> tuple[Shares | None, str]:
    """The shares of a host's ranks (of the world), and why there are none; alike on all of them."""
    descriptor, why = -1, ""
    nbytes = 0
    try:
        room = os.statvfs(FOLDER)
        nbytes = min(room.f_blocks * room.f_frsize, _MOST_BYTES_OF_ALL // host.size)
        nbytes -= nbytes % PAGE_BYTES
        flags = os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC
        descriptor = os.open(FOLDER, flags, 0o600)
        os.ftruncate(descriptor, nbytes)
        os.posix_fallocate(descriptor, 0, PAGE_BYTES)
    except OSError as error:
        why = f"{FOLDER} gives no memory ({error.strerror}); {CURE}"
    identity = (0, 0) if why else _identity(descriptor)
    said = host.allgather((f"/proc/{os.getpid()}/fd/{descriptor}", identity, nbytes, why))
    shared = min(one[2] for one in said)
    maps: list[mmap.mmap] = []
    lock = -1
    why = next((text for *_, text in said if text), "")
    if not why:
        try:
            for path, theirs, _, _ in said:
                maps.append(_map(path, theirs, shared))
            lock = _open(*said[0][:2])
        except (OSError, ValueError) as error:
            why = f"the ranks cannot open each other's memory: {error}"
    why = next((text for text in host.allgather(why) if text), "")
    if why:
        for opened in (descriptor, lock):
            if opened >= 0:
                os.close(opened)
        return None, why
    heap = Heap(descriptor, shared)
    return Shares(ranks, ranks[host.rank], maps, heap, lock), ""


def _identity(descriptor: int) -> tuple[int, int]:
    found = os.fstat(descriptor)
    return found.st_dev, found.st_ino


def _open(path: str, identity: tuple[int, int]) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    if _identity(descriptor) != identity:  # of another process namespace
        os.close(descriptor)
        raise OSError(0, f"{path} is another file here")
    return descriptor


def _map(path: str, identity: tuple[int, int], nbytes: int) -> mmap.mmap:
    descriptor = _open(path, identity)
    try:
        return mmap.mmap(descriptor, nbytes)
    finally:
        os.close(descriptor)
