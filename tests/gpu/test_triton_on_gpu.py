"""The kernel of sum and publish on a card: the reference's bits, and a copy's speed."""

from __future__ import annotations

import pytest
import torch
from mpmp_kernels import reference
from torch import Tensor

from gpu.measure import bandwidths

pytestmark = pytest.mark.ranks(1)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture
def card(device: torch.device) -> torch.device:
    pytest.importorskip("triton", reason="needs a GPU whose torch brings Triton")
    if device.type != "cuda":
        pytest.skip("needs a GPU")
    return device


def bits(x: Tensor) -> Tensor:
    return x.view(torch.int32 if x.dtype is torch.float32 else torch.int16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num", (1, 2, 3, 8, 11))
@pytest.mark.parametrize("length, offset", ((1, 0), (7, 1), (4096, 0), (1_000_003, 0), (99_999, 3)))
def test_it_is_the_reference_to_the_last_bit(
    card: torch.device, dtype: torch.dtype, num: int, length: int, offset: int
) -> None:
    from mpmp_kernels.triton_sum_publish import sum_publish

    generator = torch.Generator(card).manual_seed(length + num)
    found = []
    for number in range(num):
        x = torch.randn(length + offset, device=card, generator=generator) * 2.0**number
        x[offset] = -0.0
        found.append(x.to(dtype)[offset:])
    wanted = [x.clone() for x in found]
    apart, wanted_apart = torch.zeros_like(found[0]), torch.zeros_like(found[0])
    where = [x.data_ptr() for x in found]
    sum_publish(where, [apart.data_ptr()], length, dtype, card)
    sum_publish(where, where, length, dtype, card, 3.0)
    reference.sum_publish(wanted, [wanted_apart])
    reference.sum_publish(wanted, wanted, 3.0)
    torch.cuda.synchronize(card)
    assert torch.equal(bits(apart), bits(wanted_apart))
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(bits(one), bits(other))


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_no_number_stays_none(card: torch.device, dtype: torch.dtype) -> None:
    from mpmp_kernels.triton_sum_publish import sum_publish

    inf, nan, most = float("inf"), float("nan"), torch.finfo(dtype).max
    x = torch.tensor([inf, nan, most, -most, inf, 1.0], dtype=dtype, device=card)
    y = torch.tensor([1.0, 1.0, most, -most, -inf, nan], dtype=dtype, device=card)
    wanted = torch.empty_like(x)
    reference.sum_publish([x, y], [wanted])
    where = [x.data_ptr(), y.data_ptr()]
    sum_publish(where, where, len(x), dtype, card)
    torch.testing.assert_close(x, wanted, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(y, wanted, rtol=0, atol=0, equal_nan=True)


def test_beyond_31_bits(card: torch.device) -> None:
    from mpmp_kernels.triton_sum_publish import sum_publish

    length = (1 << 31) + 1001
    x = torch.zeros(length, dtype=torch.float16, device=card)
    x[-1000:] = 1
    sum_publish([x.data_ptr()] * 3, [x.data_ptr()], length, torch.float16, card)
    tail, before = x[-1000:].clone(), x[:-1000].count_nonzero()
    assert (tail == 3).all()
    assert before == 0


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("num", (2, 4))
def test_it_is_nearly_as_fast_as_a_copy(card: torch.device, dtype: torch.dtype, num: int) -> None:
    ours, copy = bandwidths(card, dtype, num)
    assert ours >= 0.8 * copy, f"{ours:.0f} GB/s of the {copy:.0f} GB/s of a copy"
