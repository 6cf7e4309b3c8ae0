"""safetensors files: laid out before they are written, read without believing what they say.

    8 bytes: N, little-endian | N bytes: {"name": {"dtype", "shape", "data_offsets"}, ..} | data

Wide dtypes come first, so that every tensor starts at a multiple of its element's size.
Format: https://huggingface.co/docs/safetensors (tests compare with that library).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
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
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_METADATA = "__metadata__"
_LONGEST_HEADER = 100_000_000  # bytes; the library's own limit


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file: ``offset`` counts from the beginning of the file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def size_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


# --- writing ------------------------------------------------------------------------------------


Kind = tuple[torch.dtype, tuple[int, ...]]
"""The dtype and the shape of a tensor."""


def kind_of(name: str, tensor: Tensor) -> Kind:
    """A tensor's kind; TensorError for what a safetensors file cannot hold."""
    if tensor.dtype not in NAMES or tensor.layout != torch.strided or name == _METADATA:
        raise TensorError(
            f"tensor {name!r} ({tensor.layout} of {tensor.dtype}) cannot be written to a "
            f"safetensors file; known are dense tensors of {', '.join(DTYPES)}"
        )
    return tensor.dtype, tuple(tensor.shape)


def lay_out(tensors: Mapping[str, Kind], metadata: Mapping[str, str]) -> tuple[bytes, list[Entry]]:
    """The header of a file of such tensors, and where each of them lies, in the file's order."""
    said: dict[str, Any] = {_METADATA: {"format": "pt", **metadata}}
    entries: list[Entry] = []
    end = 0
    for name in sorted(tensors, key=lambda name: (-tensors[name][0].itemsize, name)):
        dtype, shape = tensors[name]
        start, end = end, end + prod(shape) * dtype.itemsize
        said[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        entries.append(Entry(name, dtype, shape, start))
    text = json.dumps(said, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return header, [Entry(e.name, e.dtype, e.shape, e.offset + len(header)) for e in entries]


def host_bytes(tensor: Tensor) -> memoryview:
    """The elements' bytes; of a contiguous tensor on the host, its own memory."""
    flat = tensor.detach().cpu().resolve_neg().contiguous().view(-1)
    return flat.view(torch.uint8).numpy().data


# --- reading ------------------------------------------------------------------------------------


def read_entries(take: Callable[[int], bytes], size_bytes: int) -> list[Entry]:
    """The tensors of a file of that size, whose next bytes ``take`` gives, in the file's order.

    Raises CheckpointError where the header is not one that the data can have.
    """
    length = int.from_bytes(take(8), "little") if size_bytes >= 8 else 0
    if not 2 <= length <= min(size_bytes - 8, _LONGEST_HEADER):
        raise CheckpointError(f"says its header has {length} bytes, in a file of {size_bytes}")
    said = parse_object(take(length), "header")
    said.pop(_METADATA, None)
    found = sorted((_entry(name, entry) for name, entry in said.items()), key=lambda one: one[0])
    ends = [0, *(end for (_, end), _ in found)]
    data_bytes = size_bytes - 8 - length
    if [start for (start, _), _ in found] != ends[:-1] or ends[-1] != data_bytes:
        raise CheckpointError(f"describes tensors that do not fill its {data_bytes} bytes of data")
    return [Entry(e.name, e.dtype, e.shape, e.offset + 8 + length) for _, e in found]


def _entry(name: str, said: Any) -> tuple[tuple[int, int], Entry]:
    """A tensor that a header describes, and its place in the data."""
    try:
        dtype, shape = DTYPES[said["dtype"]], said["shape"]
        start, end = said["data_offsets"]
        numbers = [*shape, start, end]
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(f"describes tensor {name!r} in a way not understood") from None
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise CheckpointError(f"describes tensor {name!r} by numbers that are not lengths")
    # The second bound keeps the strides of an empty tensor within 64 bits.
    if end - start != prod(shape) * dtype.itemsize or prod(n or 1 for n in shape) >= 1 << 60:
        raise CheckpointError(
            f"gives tensor {name!r} of shape {shape} and {dtype} {end - start} bytes"
        )
    return (start, end), Entry(name, dtype, tuple(shape), start)


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
