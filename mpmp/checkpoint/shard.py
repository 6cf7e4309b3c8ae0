"""The bytes of one rank's file: where they lie in memory, or copied into a buffer that is kept."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mpmp.checkpoint.copying import copy_all
from mpmp.checkpoint.held import Held
from mpmp.checkpoint.sharing import Holding, Share
from mpmp.checkpoint.tensorfile import host_bytes, kind_of


def holding(held: Held) -> Holding:
    """What is held, without the elements; TensorError for what no file can hold."""
    dtype, _ = kind_of(held.key, held.tensor)
    return Holding(held.key, dtype, held.shape, held.extent)


def in_place(share: Share, held: Sequence[Held]) -> list[memoryview]:
    """The file in parts; those of contiguous tensors on the host are their own memory."""
    find = _Finder(held)
    return [memoryview(share.header), *(host_bytes(find(piece)) for piece, _ in share.pieces)]


class Buffer:
    """Memory of the host for a whole file, kept from save to save: its pages are there already."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def copy(self, share: Share, held: Sequence[Held]) -> list[memoryview]:
        """The file as it is now, whatever becomes of the tensors afterwards."""
        find = _Finder(held)
        if len(self._memory) < share.size_bytes:
            # Pinned where a GPU copies: it would take a detour through pinned memory else.
            pinned = any(one.tensor.is_cuda for one in held)
            self._memory = torch.empty(share.size_bytes, dtype=torch.uint8, pin_memory=pinned)
        file = self._memory[: share.size_bytes]
        file[: len(share.header)] = torch.frombuffer(bytearray(share.header), dtype=torch.uint8)
        places = (
            file[entry.offset : entry.offset + entry.size_bytes].view(entry.dtype)
            for _, entry in share.pieces
        )
        copy_all(zip(places, (find(piece) for piece, _ in share.pieces), strict=True))
        return [file.numpy().data]


class _Finder:
    """Finds the elements of a piece among what is held."""

    def __init__(self, held: Sequence[Held]) -> None:
        self._held: dict[object, list[Held]] = {}
        for one in held:
            self._held.setdefault((one.key, one.box), []).append(one)

    def __call__(self, piece: Holding) -> Tensor:
        want = piece.extent
        for one in self._held[piece.key, want.box]:
            has = one.extent
            if has.start <= want.start and want.stop <= has.stop:
                flat = one.tensor.detach().reshape(-1)
                return flat[want.start - has.start : want.stop - has.start]
        raise AssertionError(f"nobody here holds {piece}")
