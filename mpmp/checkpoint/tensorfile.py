"""safetensors files: written tensor by tensor, read without believing what they say.

    8 bytes: N, little-endian | N bytes: {"name": {"dtype", "shape", "data_offsets"}, ..} | data

Wide dtypes come first, so that every tensor starts at a multiple of its element's size.
Format: https://huggingface.co/docs/safetensors (tests compare with that library).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor

from mpmp.errors import CheckpointError, TensorError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_METADATA = "__metadata__"
_LONGEST_HEADER = 100_000_000  # bytes; the library's own limit


# --- writing ------------------------------------------------------------------------------------


def write(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    put: Callable[[bytes | memoryview], object],
) -> None:
    """Give the bytes of a file to ``put``, one tensor at a time on the host."""
    put(_header(tensors, metadata))
    for name in _order(tensors):
        put(_host_bytes(tensors[name]))


def size_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> int:
    """Length of the file that :func:`write` makes; raises TensorError for what it cannot hold."""
    data = sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())
    return len(_header(tensors, metadata)) + data


def _order(tensors: Mapping[str, Tensor]) -> list[str]:
    return sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))


def _header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, Any] = {_METADATA: {"format": "pt", **metadata}}
    offset = 0
    for name in _order(tensors):
        tensor = tensors[name]
        if tensor.dtype not in _NAMES or tensor.layout != torch.strided or name == _METADATA:
            raise TensorError(
                f"tensor {name!r} ({tensor.layout} of {tensor.dtype}) cannot be written to a "
                f"safetensors file; known are dense tensors of {', '.join(DTYPES)}"
            )
        end = offset + tensor.numel() * tensor.itemsize
        entries[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _host_bytes(tensor: Tensor) -> memoryview:
    """The elements' bytes; of a contiguous tensor on the host, its own memory."""
    flat = tensor.detach().cpu().resolve_neg().contiguous().view(-1)
    return flat.view(torch.uint8).numpy().data


# --- reading ------------------------------------------------------------------------------------


def read(fill: Callable[[memoryview], None], size_bytes: int) -> dict[str, Tensor]:
    """Tensors, on the host, of a file of that size whose next bytes ``fill`` puts into memory.

    Raises CheckpointError where the header is not one that the data can have.
    """

    def take(count: int) -> bytes:
        buffer = bytearray(count)
        fill(memoryview(buffer))
        return bytes(buffer)

    length = int.from_bytes(take(8), "little") if size_bytes >= 8 else 0
    if not 2 <= length <= min(size_bytes - 8, _LONGEST_HEADER):
        raise CheckpointError(f"says its header has {length} bytes, in a file of {size_bytes}")
    tensors = {}
    for name, shape, dtype in _entries(take(length), size_bytes - 8 - length):
        tensors[name] = torch.empty(shape, dtype=dtype)
        fill(_host_bytes(tensors[name]))
    return tensors


def _entries(header: bytes, data_bytes: int) -> list[tuple[str, list[int], torch.dtype]]:
    """Name, shape and dtype in the order of the data, which they fill without a gap."""
    said = parse_object(header, "header")
    said.pop(_METADATA, None)
    found = []
    for name, entry in said.items():
        try:
            dtype, shape, (start, end) = (
                DTYPES[entry["dtype"]],
                entry["shape"],
                entry["data_offsets"],
            )
            whole = [*shape, start, end]
        except (KeyError, TypeError, ValueError):
            raise CheckpointError(f"describes tensor {name!r} in a way not understood") from None
        if not all(type(number) is int and number >= 0 for number in whole):
            raise CheckpointError(f"describes tensor {name!r} by numbers that are not lengths")
        # The second bound keeps the strides of an empty tensor within 64 bits.
        if end - start != prod(shape) * dtype.itemsize or prod(n or 1 for n in shape) >= 1 << 60:
            raise CheckpointError(
                f"gives tensor {name!r} of shape {shape} and {dtype} {end - start} bytes"
            )
        found.append((start, end, name, shape, dtype))
    found.sort(key=lambda one: one[:3])
    ends = [0, *(one[1] for one in found)]
    if [one[0] for one in found] != ends[:-1] or ends[-1] != data_bytes:
        raise CheckpointError(f"describes tensors that do not fill its {data_bytes} bytes of data")
    return [(name, shape, dtype) for _, _, name, shape, dtype in found]


def parse_object(text: bytes, what: str) -> dict[str, Any]:
    """A JSON object whose names are all different; else CheckpointError."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a name stands twice")
        return dict(pairs)

    try:
        found = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"has a {what} that is not JSON ({error})") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"has a {what} that is not a JSON object")
    return found
