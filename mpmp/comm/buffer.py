"""The one door for tensors into MPI: contiguous, of a known dtype, on a known device.

MPI moves bytes and never sees a dtype, so it can neither misread a bf16 tensor nor sum garbage.
Messages longer than MPI's 31-bit counts are cut into pieces (plans cut theirs finer still).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mpmp.comm.mpi import MPI
from mpmp.errors import TensorError

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
DTYPES = (*FLOATS, *INTEGERS, torch.bool)
"""What may travel; bool may travel but not be summed."""

PIECE_BYTES = 1 << 30
"""Longest message; Open MPI refuses counts beyond 2^31 - 1."""


def admit(tensor: Tensor) -> Tensor:
    """The tensor as one dim of contiguous elements, sharing its memory; else TensorError."""
    if tensor.layout != torch.strided:
        raise TensorError(f"a {tensor.layout} tensor cannot be sent; call .to_dense() first")
    if tensor.device.type not in ("cpu", "cuda"):
        raise TensorError(f"a tensor on {tensor.device} cannot be sent; move it to cpu or cuda")
    if tensor.dtype not in DTYPES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise TensorError(f"a tensor of {tensor.dtype} cannot be sent; known are {known}")
    if tensor.requires_grad:
        raise TensorError(
            "a tensor that requires grad cannot be sent, its gradient would be lost; "
            "detach() it or use an adjoint of mpmp.parallel"
        )
    if not tensor.is_contiguous() or tensor.is_neg():
        raise TensorError(
            f"a tensor of shape {tuple(tensor.shape)} and strides {tensor.stride()} is not "
            "contiguous; call .contiguous() first"
        )
    return tensor.view(-1)


def wire_dtype(dtype: torch.dtype, reduces: bool) -> torch.dtype:
    """What travels: partial sums of 16-bit floats travel, and are summed, in float32."""
    if reduces and dtype is torch.bool:
        raise TensorError("bool tensors cannot be reduced; convert them to an integer dtype")
    if reduces and dtype in (torch.float16, torch.bfloat16):
        return torch.float32
    return dtype


def as_bytes(flat: Tensor) -> list[Any]:
    """What mpi4py takes for a message: the bytes of a contiguous tensor, on any device.

    A CUDA tensor is handed over by its device pointer: only where MPI was found to be CUDA-aware.
    """
    if flat.numel() == 0:
        return [b"", MPI.BYTE]
    if flat.is_cuda:
        return [flat.view(torch.uint8), MPI.BYTE]
    return [flat.view(torch.uint8).numpy(), MPI.BYTE]


def pieces(start: int, stop: int, itemsize: int) -> Iterator[tuple[int, int]]:
    """Cut elements [start, stop) into messages of at most PIECE_BYTES."""
    step = PIECE_BYTES // itemsize
    for low in range(start, stop, step):
        yield low, min(low + step, stop)


def load(target: Tensor, source: Tensor) -> None:
    """Copy between buffers of any dtype and device, ordered with the current stream.

    A copy between a GPU and the host is complete on return: MPI may read what arrived, and the
    host's memory may be filled again, for whatever stream.
    """
    if target.data_ptr() == source.data_ptr() and target.dtype == source.dtype:
        return
    if source.is_cuda == target.is_cuda:
        target.copy_(source)
        return
    # Dtypes are converted on the GPU: torch would take pageable memory to do it on the host.
    if source.is_cuda:
        target.copy_(source.to(target.dtype), non_blocking=True)
    elif source.dtype == target.dtype:
        target.copy_(source, non_blocking=True)
    else:
        arrived = torch.empty_like(target, dtype=source.dtype)
        target.copy_(arrived.copy_(source, non_blocking=True))
    torch.cuda.current_stream((source if source.is_cuda else target).device).synchronize()
