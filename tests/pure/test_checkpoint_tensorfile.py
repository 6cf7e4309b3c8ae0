"""safetensors files: the same bytes as the library's, bits kept, no lie of a header believed."""

import io
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor

from mpmp.checkpoint import ALONE, Held, tensor_files, tensorfile
from mpmp.checkpoint import read as read_into
from mpmp.checkpoint.exporting import write_tensors
from mpmp.errors import CheckpointError, TensorError


def written(tensors: dict[str, Tensor]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        write_tensors(Path(folder) / "file", tensors, {})
        return (Path(folder) / "file").read_bytes()


def read(data: bytes) -> dict[str, Tensor]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        path.write_bytes(data)
        contents = tensor_files([path], ALONE)
        found = {
            name: torch.empty(one.shape, dtype=one.dtype) for name, one in contents.tensors.items()
        }
        read_into(contents, [Held.whole(name, one) for name, one in found.items()], ALONE)
        return found


def bits(tensor: Tensor) -> tuple[Any, ...]:
    return (
        tensor.dtype,
        tuple(tensor.shape),
        tensor.contiguous().view(-1).view(torch.uint8).tolist(),
    )


def some(dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    return torch.randint(0, 2, shape).to(dtype) if dtype == torch.bool else torch.ones(shape) * 3


EVERY_DTYPE = {
    f"{name}{list(shape)}": some(dtype, shape).to(dtype)
    for name, dtype in tensorfile.DTYPES.items()
    for shape in [(), (0,), (3,), (2, 0, 5), (3, 5, 1)]
}


def test_every_dtype_and_shape_comes_back_bit_for_bit_here_and_in_the_library() -> None:
    data = written(EVERY_DTYPE)
    for found in (read(data), load(data)):
        assert {name: bits(t) for name, t in found.items()} == {
            name: bits(t) for name, t in EVERY_DTYPE.items()
        }


def test_the_librarys_files_are_read() -> None:
    found = read(save(EVERY_DTYPE, {"a": "b"}))
    assert {n: bits(t) for n, t in found.items()} == {n: bits(t) for n, t in EVERY_DTYPE.items()}


def test_nan_payloads_signed_zeros_and_names_of_all_alphabets_survive() -> None:
    odd = torch.tensor([0x7FC0, -0x0001, -0x8000, 0x0001], dtype=torch.int16)
    tensors = {"слой.0/ß weight": odd.view(torch.bfloat16)}
    (found,) = read(written(tensors)).values()
    assert found.dtype == torch.bfloat16 and torch.equal(found.view(torch.int16), odd)
    assert list(load(written(tensors))) == list(tensors)


@pytest.mark.parametrize(
    "strange",
    [
        lambda x: x.t(),
        lambda x: x[::2, 1:],
        lambda x: x[:1].expand(4, 6),
        lambda x: x.clone().requires_grad_(),
        lambda x: torch.complex(x, x).conj().imag,  # carries the bit that says "negative"
    ],
    ids=["transposed", "strided", "expanded", "requires grad", "negated"],
)
def test_views_are_written_as_what_they_show(strange: Callable[[Tensor], Tensor]) -> None:
    view = strange(torch.arange(24.0).view(4, 6))
    assert torch.equal(read(written({"x": view}))["x"], view.detach())


@pytest.mark.parametrize(
    "tensors",
    [
        {"x": torch.zeros(2, dtype=torch.complex64)},
        {"x": torch.zeros(2, 2).to_sparse()},
        {"__metadata__": torch.zeros(2)},
    ],
    ids=["complex", "sparse", "reserved name"],
)
def test_what_the_format_cannot_hold_is_refused_by_name(tensors: dict[str, Tensor]) -> None:
    with pytest.raises(TensorError, match="cannot be written"):
        written(tensors)


def forged(header: object, data: bytes = bytes(8)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(start: int = 0, end: int = 8, shape: object = (2,), dtype: object = "F32") -> object:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


LIES = {
    "empty": b"",
    "seven bytes": b"1234567",
    "header longer than the file": (1 << 20).to_bytes(8, "little") + bytes(100),
    "header of 2^63 bytes": (1 << 63).to_bytes(8, "little") + bytes(100),
    "header of no bytes": bytes(100),
    "not JSON": forged(b"{]"),
    "not UTF-8": forged(b'{"\xff": 1}'),
    "a list": forged([1, 2]),
    "nested too deep": forged(b"[" * 100_000),
    "a number of 5000 digits": forged(b'{"x": ' + b"1" * 5000 + b"}"),
    "a pickle": b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94." + bytes(64),
    "a name twice": forged(b'{"x": %b, "x": %b}' % ((json.dumps(entry()).encode(),) * 2)),
    "entry is a number": forged({"x": 3}),
    "entry is null": forged({"x": None}),
    "nothing said of it": forged({"x": {}}),
    "unknown dtype": forged({"x": entry(dtype="F7")}),
    "dtype is a list": forged({"x": entry(dtype=["F32"])}),
    "three offsets": forged({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4, 8]}}),
    "negative dims": forged({"x": entry(shape=[-1, -2])}),
    "dims are truths": forged({"x": entry(shape=[2, True])}),
    "dims are fractions": forged({"x": entry(shape=[2.0])}),
    "shape is a string": forged({"x": entry(shape="2")}),
    "shape is a number": forged({"x": entry(shape=2)}),
    "shape too large": forged({"x": entry(shape=[3])}),
    "huge shape": forged({"x": entry(shape=[1 << 61, 1 << 61])}),
    "huge empty shape": forged({"x": entry(0, 0, [0, 1 << 62, 1 << 62])}, b""),
    "offsets turned round": forged({"x": entry(8, 0)}),
    "beyond the end": forged({"x": entry(8, 16)}),
    "data left over": forged({"x": entry()}, bytes(9)),
    "data missing": forged({"x": entry()}, bytes(7)),
    "overlap": forged({"x": entry(), "y": entry()}),
    "a gap": forged({"x": entry(), "y": entry(12, 20)}, bytes(20)),
}


@pytest.mark.parametrize("data", LIES.values(), ids=LIES)
def test_a_header_that_lies_is_a_checkpoint_error(data: bytes) -> None:
    file = io.BytesIO(data)

    def take(count: int) -> bytes:
        assert file.tell() + count <= len(data), "read beyond the end"
        return file.read(count)

    with pytest.raises(CheckpointError):
        tensorfile.read_entries(take, len(data))


@given(st.data())
def test_any_change_of_a_header_is_refused_or_harmless(draw: st.DataObject) -> None:
    data = bytearray(written({"a": torch.arange(3.0), "b": torch.zeros(2, dtype=torch.uint8)}))
    for _ in range(draw.draw(st.integers(1, 4))):
        at = draw.draw(st.integers(0, len(data) - 15))
        data[at] = draw.draw(st.integers(0, 255))
    try:
        read(bytes(data))
    except CheckpointError:
        pass
