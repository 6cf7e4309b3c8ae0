"""Reductions: which there are, in which order they combine, and what their bits are."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

import mpmp
from mpmp.comm import plan
from mpmp.comm.buffer import FLOATS
from mpmp.errors import ConfigError, TensorError
from mpmp.programs.collectives import COLLECTIVES
from mpmp.programs.windows import WindowAlgorithm

LENGTHS = (1, 2, 3, 5, 8, 33, 1001)
MESSAGES = [
    name for name, one in COLLECTIVES["allreduce"].items() if not isinstance(one, WindowAlgorithm)
]


@pytest.fixture(scope="module")
def group(world):
    mesh = mpmp.mesh(tensor=world.size)
    yield mesh.tensor
    mesh.free()


def bits_alike(group, x):
    """Whether all ranks hold the same bits."""
    bits = x.contiguous().view(-1).view(torch.uint8)
    return all(
        torch.equal(bits, other.view(-1)) for other in group.allgather(bits).chunk(group.size)
    )


def awkward(length, rank, dtype):
    """Signed zeros, infinities, NaNs with a payload of each rank's own, and plain numbers."""
    values = torch.tensor([0.0, -0.0, 1.5, -2.25, float("inf"), float("-inf"), 3.0], dtype=dtype)
    x = values[(torch.arange(length) * 5 + 3 * rank + torch.arange(length) // 7) % 7].clone()
    integer = {8: torch.int64, 4: torch.int32, 2: torch.int16}[dtype.itemsize]
    nan = torch.tensor([float("nan")], dtype=dtype).view(integer) + rank + 1
    x[rank :: group_stride(length)] = nan.view(dtype)
    return x


def group_stride(length):
    return max(6, length // 20)


@pytest.mark.parametrize("algorithm", MESSAGES)
@pytest.mark.parametrize("op", ("sum", "max", "min", "prod"))
def test_signed_zeros_and_nans_have_the_same_bits_everywhere(group, algorithm, op):
    numpy = {"sum": np.add, "max": np.maximum, "min": np.minimum, "prod": np.multiply}[op]
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for length in LENGTHS:
            every = [awkward(length, rank, dtype).double().numpy() for rank in range(group.size)]
            with np.errstate(invalid="ignore"):
                expected = functools.reduce(numpy, every)
            result = group.allreduce(awkward(length, group.rank, dtype), op, algorithm)
            assert bits_alike(group, result), (dtype, length)
            assert np.array_equal(np.isnan(result.double().numpy()), np.isnan(expected))
            if op in ("max", "min"):
                assert np.array_equal(result.double().numpy(), expected, equal_nan=True)


@pytest.mark.parametrize("algorithm", MESSAGES)
def test_random_sums_have_the_same_bits_everywhere(group, algorithm, monkeypatch):
    monkeypatch.setattr(plan, "PIECE_BYTES", 1 << 12)
    for length in (7, 1001, 70_001):
        x = torch.randn(length, generator=torch.Generator().manual_seed(group.rank))
        result = group.allreduce(x, algorithm=algorithm)
        total = sum(
            torch.randn(length, generator=torch.Generator().manual_seed(r)).double()
            for r in range(group.size)
        )
        assert torch.allclose(result.double(), total, atol=1e-5)
        assert bits_alike(group, result)


def in_rank_order(length, size, dtype):
    """The sum as one rank computes it; 16-bit floats are rounded once."""
    every = [randoms(length, rank, dtype) for rank in range(size)]
    wide = [one.float() if dtype.itemsize == 2 else one for one in every]
    return functools.reduce(torch.add, wide).to(dtype)


def randoms(length, rank, dtype):
    return torch.randn(length, generator=torch.Generator().manual_seed(rank)).to(dtype)


@pytest.mark.parametrize("dtype", FLOATS)
def test_fixed_order_has_the_bits_of_a_sum_on_one_rank(group, dtype):
    for length in (1, group.size + 1, 1001, 300_001):
        x = randoms(length, group.rank, dtype)
        expected = in_rank_order(length, group.size, dtype)
        assert torch.equal(group.allreduce(x, order="fixed"), expected), length
        assert torch.equal(group.allreduce(x, algorithm="direct", order="fixed"), expected)
        pieces = expected.tensor_split(group.size)
        assert torch.equal(group.reduce_scatter(x, order="fixed"), pieces[group.rank])
        prepared = x.clone()
        group.prepare_allreduce(prepared, order="fixed").run()
        assert torch.equal(prepared, expected)


def test_only_what_sums_in_rank_order_does_so_on_demand(group):
    for algorithm in ("ring", "recursive_doubling"):
        with pytest.raises(ConfigError, match="rank order.*direct"):
            group.allreduce(torch.zeros(3), algorithm=algorithm, order="fixed")
    with pytest.raises(ConfigError, match="known: any, fixed"):
        group.allreduce(torch.zeros(3), order="some")


@pytest.mark.parametrize("algorithm", MESSAGES)
def test_an_average_is_the_sum_divided_once(group, algorithm):
    for dtype in FLOATS:
        x = randoms(1001, group.rank, dtype)
        wide = group.allreduce(x.float() if dtype.itemsize == 2 else x, algorithm=algorithm)
        expected = (wide / group.size).to(dtype)
        assert torch.equal(group.allreduce(x, "avg", algorithm), expected)
    own = group.reduce_scatter(torch.full((group.size,), 3.0), "avg")
    at_root = group.reduce(torch.full((5,), float(group.rank)), op="avg")
    assert own.tolist() == [3.0]
    if at_root is not None:
        assert at_root.tolist() == [(group.size - 1) / 2] * 5
    with pytest.raises(TensorError, match="op='sum' and divide"):
        group.allreduce(torch.zeros(3, dtype=torch.int64), "avg")


def longest(a, b):
    return torch.where(a.abs() >= b.abs(), a, b)


def product(a, b, out=None):
    return torch.mul(a, b, out=out)


def maxima(a, b):
    return torch.maximum(a, b)


def minima(a, b):
    return torch.minimum(a, b)


@pytest.mark.parametrize("algorithm", MESSAGES)
def test_a_function_of_the_users_own(group, algorithm):
    for length in (1, 33, 100_000):
        every = [randoms(length, rank, torch.float32) for rank in range(group.size)]
        for function in (longest, product, torch.maximum):
            result = group.allreduce(every[group.rank], function, algorithm)
            assert torch.allclose(result, functools.reduce(function, every))
            assert bits_alike(group, result)
    least = group.allreduce(every[group.rank], lambda a, b: torch.minimum(a, b), algorithm)
    most = group.allreduce(every[group.rank], lambda a, b: torch.maximum(a, b), algorithm)
    assert torch.equal(least, functools.reduce(torch.minimum, every))
    assert torch.equal(most, functools.reduce(torch.maximum, every))


def test_functions_are_compared_by_name(group):
    with pytest.raises(ConfigError, match="def"):
        group.allreduce(torch.zeros(3), functools.partial(product))
    if group.size > 1:
        with pytest.raises(TensorError, match="disagree.*maxima"):
            group.allreduce(torch.zeros(7), maxima if group.rank == 0 else minima)
    with pytest.raises(ConfigError, match='did you mean "sum"'):
        group.allreduce(torch.zeros(3), "smu")


def test_a_list_is_reduced_as_one_vector_a_dtype(group):
    shapes = [(3, 2), (), (0,), (5,), (1, 1, 7)]
    dtypes = [torch.float32, torch.float64, torch.float32, torch.bfloat16, torch.float64]

    def make(rank):
        return [
            torch.full(shape, float(rank + index)).to(dtype)
            for index, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=True))
        ]

    expected = [sum(one) for one in zip(*map(make, range(group.size)), strict=True)]
    mine = make(group.rank)
    results = group.allreduce(mine)
    in_place = make(group.rank)
    assert group.allreduce(in_place, out=in_place)[0] is in_place[0]
    replayed = make(group.rank)
    prepared = group.prepare_allreduce(replayed, "max")
    prepared.run()
    prepared.start().wait()
    prepared.free()
    most = make(group.size - 1)
    for index, total in enumerate(expected):
        assert torch.equal(results[index], total) and torch.equal(in_place[index], total)
        assert torch.equal(mine[index], make(group.rank)[index]), "the input is left alone"
        assert torch.equal(replayed[index], most[index])
    assert group.allreduce([]) == []
    with pytest.raises(TensorError, match="out has 1"):
        group.allreduce(mine, out=mine[:1])
    with pytest.raises(TensorError, match="lie on cpu, meta"):
        group.allreduce([torch.zeros(1), torch.zeros(1, device="meta")])
