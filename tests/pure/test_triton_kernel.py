"""The GPU kernel of sum and publish: its arithmetic in Triton's interpreter, its code for a card.

The interpreter runs kernels on the CPU, float32 and float16 rightly; its bfloat16 is wrong, so that
only a GPU can tell (tests/gpu/test_triton_on_gpu.py). The compiler needs no card either.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from mpmp_kernels import reference
from torch import Tensor

CPU = torch.device("cpu")
Kernel = Callable[..., None]

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs triton, which CUDA's torch brings"
)


@pytest.fixture(scope="module")
def kernel() -> Iterator[Kernel]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")  # read when the kernel's module is imported
        from mpmp_kernels import triton_sum_publish

        yield triton_sum_publish.sum_publish


def rows(num: int, length: int, dtype: torch.dtype, offset: int = 0) -> list[Tensor]:
    """Tensors that begin ``offset`` elements behind an address that is a multiple of 64 bytes."""
    generator = torch.Generator().manual_seed(num * length)
    found = []
    for _ in range(num):
        x = torch.randn(length + offset, generator=generator).to(dtype)
        x[offset : offset + 1] = -0.0
        found.append(x[offset:])
    return found


def addresses(tensors: list[Tensor]) -> list[int]:
    return [one.data_ptr() for one in tensors]


def same(found: Tensor, wanted: Tensor) -> bool:
    return torch.equal(found.view(torch.uint8), wanted.view(torch.uint8))


@needs_triton
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16))
@pytest.mark.parametrize("num", (1, 2, 3, 9))
@pytest.mark.parametrize("length, offset", ((0, 0), (1, 0), (7, 1), (4096, 0), (9001, 3)))
@pytest.mark.parametrize("divide", (1.0, 3.0))
def test_in_place_it_is_the_reference(
    kernel: Kernel, dtype: torch.dtype, num: int, length: int, offset: int, divide: float
) -> None:
    found = rows(num, length, dtype, offset)
    wanted = [one.clone() for one in found]
    kernel(addresses(found), addresses(found), length, dtype, CPU, divide)
    reference.sum_publish(wanted, wanted, divide)
    assert all(same(*pair) for pair in zip(found, wanted, strict=True))


@needs_triton
def test_into_another_place(kernel: Kernel) -> None:
    sources = rows(3, 5000, torch.float16)
    before = [one.clone() for one in sources]
    found, wanted = torch.full((5002,), 7.0).half(), torch.empty(5000).half()
    kernel(addresses(sources), [found[1:].data_ptr()], 5000, torch.float16, CPU)
    reference.sum_publish(sources, [wanted])
    assert same(found[1:5001], wanted)
    assert found[0] == found[-1] == 7  # nothing beside it was touched
    assert all(same(*pair) for pair in zip(sources, before, strict=True))


COMPILE = """
import triton
from mpmp_kernels.triton_sum_publish import DTYPES, _sum_publish
from triton.backends.compiler import GPUTarget
names = _sum_publish.arg_names
for dtype, word in DTYPES.items():
    fixed = {"num_sources": 4, "num_targets": 4, "divides": True, "dtype": word, "wide": True}
    fixed["block"] = 8192 // dtype.itemsize
    types = {"sources": "*i64", "targets": "*i64", "length": "i64", "divide": "fp32"}
    source = triton.compiler.ASTSource(
        fn=_sum_publish,
        signature={**types, **dict.fromkeys(fixed, "constexpr")},
        constexprs={(names.index(name),): value for name, value in fixed.items()},
    )
    for capability in (80, 90):
        target = GPUTarget("cuda", capability, 32)
        print(triton.compile(source, target=target, options={"num_warps": 8}).asm["ptx"])
"""


@needs_triton
def test_it_compiles_for_cards_with_the_widest_loads(tmp_path: Path) -> None:
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    run = subprocess.run(
        [sys.executable, "-c", COMPILE], env=env, capture_output=True, text=True, timeout=200
    )
    assert run.returncode == 0, run.stderr
    kernels = run.stdout.split(".visible .entry")[1:]
    assert len(kernels) == 6
    for ptx in kernels:
        # A block is read twice by a thread from each of 4 sources, and stored as often.
        assert len(re.findall(r"ld\.global[.\w]*\.v4\.b32", ptx)) == 8
        assert len(re.findall(r"st\.global[.\w]*\.v4\.b32", ptx)) == 8
        assert "div.rn" in ptx and "div.full" not in ptx


# --- the reference, which defines all kernels -----------------------------------------------------


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_16_bit_floats_are_rounded_once(dtype: torch.dtype) -> None:
    tiny = torch.finfo(dtype).eps / 2  # lost one by one, seen together
    sources = [torch.ones(3, dtype=dtype), *(torch.full((3,), tiny, dtype=dtype),) * 2]
    targets = [torch.zeros(3, dtype=dtype) for _ in range(2)]
    reference.sum_publish(sources, targets)
    one_by_one = sources[0] + sources[1] + sources[2]
    assert (one_by_one == 1).all()
    assert all((one == 1 + 2 * tiny).all() for one in targets)


def test_integers_wrap_and_their_quotient_is_cut() -> None:
    x = torch.tensor([100, -100, 7], dtype=torch.int8)
    targets = [torch.zeros_like(x), x]
    reference.sum_publish([x, x.clone()], targets, 3.0)
    assert targets[0].tolist() == targets[1].tolist() == [-18, 18, 4]


def test_one_source_is_itself() -> None:
    x = torch.tensor([-0.0, 2.5])
    target = torch.zeros(2)
    reference.sum_publish([x], [x, target])
    assert same(x, torch.tensor([-0.0, 2.5])) and same(target, x)
