"""What the collectives ask of their arguments; a TensorError says at the call what does not fit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod

import torch
from torch import Tensor

from mpmp.comm.buffer import DTYPES, admit
from mpmp.errors import TensorError


def rows_of(x: Tensor) -> tuple[int, int]:
    """Number of rows along dim 0, and elements of a row."""
    if x.dim() == 0:
        raise TensorError("a tensor without dims cannot be scattered or gathered; give it one")
    return x.shape[0], prod(x.shape[1:])


def times(lengths: Sequence[int], row: int) -> tuple[int, ...]:
    """Elements of so many rows."""
    return tuple(length * row for length in lengths)


def root_of(root: int, group: object, size: int) -> int:
    """The root, where it is a rank of the group."""
    if not isinstance(root, int) or not 0 <= root < size:
        raise TensorError(f"root {root} is not a rank of {group}")
    return root


def lengths_for(what: str, lengths: Sequence[int], size: int, whole: int | None) -> list[int]:
    """Rows of every rank, none negative, ``whole`` in all where that is given."""
    found = [int(length) for length in lengths]
    if len(found) != size or min(found) < 0 or (whole is not None and sum(found) != whole):
        rows = "" if whole is None else f" of {whole} rows"
        raise TensorError(f"{what}{rows} over {size} ranks does not fit the lengths {found}")
    return found


def own_length(what: str, lengths: list[int], rank: int, rows: int) -> list[int]:
    """The lengths, where this rank's is what it brings."""
    if lengths[rank] != rows:
        raise TensorError(
            f"{what} of {rows} rows on rank {rank} of {len(lengths)} does not fit the lengths "
            f"{lengths}"
        )
    return lengths


def result_for(x: Tensor, shape: Sequence[int], out: Tensor | None, place: int = 0) -> Tensor:
    """A new tensor like ``x`` but of that shape, or ``out`` where it is one.

    ``out`` may be the input itself: then ``x`` begins at its element ``place``. Memory that both
    share in any other way would be overwritten before all of it was read.
    """
    if out is None:
        return torch.empty(tuple(shape), dtype=x.dtype, device=x.device)
    if tuple(out.shape) != tuple(shape) or out.dtype != x.dtype or out.device != x.device:
        raise TensorError(
            f"out is {tuple(out.shape)} of {out.dtype} on {out.device}, the result is "
            f"{tuple(shape)} of {x.dtype} on {x.device}; they must agree"
        )
    behind = x.data_ptr() - out.data_ptr()
    overlap = -x.nbytes < behind < out.nbytes and x.numel() and out.numel()
    if overlap and behind != place * x.itemsize:
        raise TensorError(
            "out overlaps the input, shifted against it; give it the input's own place or other "
            "memory"
        )
    return out


def list_of(
    tensors: Iterable[Tensor], out: Iterable[Tensor] | None
) -> tuple[list[Tensor], list[Tensor] | None]:
    """The tensors of a list, all on one device, with as many of ``out`` that fit them."""
    tensors, out = list(tensors), None if out is None else list(out)
    devices = {one.device for one in tensors}
    if len(devices) > 1:
        listed = ", ".join(sorted(map(str, devices)))
        raise TensorError(f"the tensors of a list lie on {listed}; reduce those of a device apart")
    if out is not None:
        if len(out) != len(tensors):
            raise TensorError(f"out has {len(out)} tensors, the list has {len(tensors)}")
        for one, other in zip(tensors, out, strict=True):
            result_for(one, one.shape, other)
    for one in [*tensors, *(out or [])]:
        admit(one)
    return tensors, out


def dtype_number(dtype: torch.dtype) -> int:
    """A number that ranks can compare."""
    return DTYPES.index(dtype)
