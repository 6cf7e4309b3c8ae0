"""Collectives in windows against plain torch: programs, dtypes, lengths, placements, reductions."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from mpmp.comm import window
from mpmp.comm.buffer import FLOATS, INTEGERS
from mpmp.comm.reductions import NONE, REDUCTIONS, find
from mpmp.errors import TensorError
from ranks.windowed import (
    PLACEMENTS,
    PROGRAMS,
    Alike,
    bits,
    in_rank_order,
    placed,
    same_bits,
    spec_of,
    values,
)

SMALL_SLOT = 4096
REDUCING = [one for one in PROGRAMS if one[0] in ("allreduce", "reduce_scatter")]
DTYPES = (*FLOATS, *INTEGERS)

pytestmark = pytest.mark.ranks(1, 2, 3, 4, timeout=120)


@pytest.fixture
def alike(world):
    found = Alike()
    yield found
    assert found.agree(world), "the ranks' results differ in their bits"


@pytest.fixture
def small_slot(monkeypatch):
    """Slots so small that ordinary tensors pass in many pieces."""
    monkeypatch.setattr(window, "SLOT_BYTES", SMALL_SLOT)


def lengths_of(size):
    return sorted({0, 1, size - 1, size, size + 1, 1001, 5003})


def carried_out(windows, spec, reduction, x, placement):
    """The result of a call whose tensors, ``x`` is a copy of one, lie where ``placement`` says."""
    rank, bounds, n = windows.comm.rank, spec.bounds, spec.bounds[-1]
    first, end = (bounds[rank], bounds[rank + 1]) if len(bounds) > windows.size else (0, n)
    at, start, length = 0, 0, n
    if spec.collective == "allgather":
        at, x = first, x[first:end]
    if spec.collective == "reduce_scatter":
        start, length = first, end - first
    own = placed(windows, x.numel(), spec.dtype, placement).copy_(x)
    result = placed(windows, length, spec.dtype, placement)
    windows.carry_out(spec, reduction, own, at, result, start)
    assert same_bits(own, x), "the input is left alone"
    return result


def own_part(windows, spec, whole):
    if spec.collective != "reduce_scatter":
        return whole
    rank = windows.comm.rank
    return whole[spec.bounds[rank] : spec.bounds[rank + 1]]


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize(("collective", "name"), REDUCING)
def test_sums_have_the_bits_of_a_sum_on_one_rank(
    small_slot, sums, windows, alike, collective, name, placement
):
    for dtype in DTYPES:
        for length in lengths_of(windows.size):
            every = [values(length, rank, dtype) for rank in range(windows.size)]
            spec = spec_of(collective, name, length, windows.size, dtype)
            x = every[windows.comm.rank]
            result = carried_out(windows, spec, REDUCTIONS["sum"], x, placement)
            expected = own_part(windows, spec, in_rank_order(every))
            assert same_bits(result, expected), (dtype, length)
            if collective == "allreduce":
                alike(result)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize(("collective", "name"), REDUCING)
def test_other_reductions(small_slot, sums, windows, alike, collective, name, placement):
    for op in ("avg", "max", "min", "prod"):
        dtypes = FLOATS if op == "avg" else (torch.float32, torch.bfloat16, torch.int64, torch.int8)
        for dtype in dtypes:
            for length in (0, 1, windows.size + 1, 5003):
                every = [values(length, rank, dtype) for rank in range(windows.size)]
                spec = spec_of(collective, name, length, windows.size, dtype, op)
                x = every[windows.comm.rank]
                result = carried_out(windows, spec, REDUCTIONS[op], x, placement)
                expected = own_part(windows, spec, in_rank_order(every, op))
                assert same_bits(result, expected), (op, dtype, length)
                if collective == "allreduce":
                    alike(result)


def longest(a, b):
    return torch.where(a.abs() >= b.abs(), a, b)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize(("collective", "name"), REDUCING)
def test_a_function_of_the_users_own(small_slot, sums, windows, collective, name, placement):
    for dtype in (torch.float32, torch.float16, torch.int32):
        reduction = find(longest, dtype)
        for length in (1, windows.size + 1, 2003):
            every = [values(length, rank, dtype) for rank in range(windows.size)]
            spec = spec_of(collective, name, length, windows.size, dtype, reduction.name)
            x = every[windows.comm.rank]
            result = carried_out(windows, spec, reduction, x, placement)
            expected = own_part(windows, spec, in_rank_order(every, combine=longest))
            assert same_bits(result, expected), (dtype, length)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_allgather_and_broadcast_move_bits(small_slot, sums, windows, alike, placement):
    size = windows.size
    for dtype in (*DTYPES, torch.bool):
        for length in lengths_of(size):
            every = [values(length, rank, dtype) for rank in range(size)]
            spec = spec_of("allgather", "window", length, size, dtype)
            x = every[windows.comm.rank]
            result = carried_out(windows, spec, NONE, x, placement)
            pieces = [every[r][spec.bounds[r] : spec.bounds[r + 1]] for r in range(size)]
            assert same_bits(result, torch.cat(pieces)), (dtype, length)
            alike(result)
            for root in range(size):
                spec = spec_of("broadcast", "window", length, size, dtype, root=root)
                result = carried_out(windows, spec, NONE, x, placement)
                assert same_bits(result, every[root]), (dtype, length, root)
                alike(result)


def awkward(length, rank, dtype):
    """Signed zeros, infinities, NaNs and plain numbers, at other places on every rank."""
    values = torch.tensor(
        [0.0, -0.0, 1.5, -2.25, float("inf"), float("-inf"), float("nan"), 3.0], dtype=dtype
    )
    at = torch.arange(length)
    return values[(at * 5 + 3 * rank + at // 8) % 8].clone()


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("name", ("window", "one_shot", "two_shot"))
def test_signed_zeros_and_nans_have_the_same_bits_everywhere(sums, windows, alike, name, placement):
    numpy = {"sum": np.add, "max": np.maximum, "min": np.minimum, "prod": np.multiply}
    for op, function in numpy.items():
        for dtype in FLOATS:
            for length in (1, 7, 33, 1001):
                every = [awkward(length, rank, dtype) for rank in range(windows.size)]
                spec = spec_of("allreduce", name, length, windows.size, dtype, op)
                x = every[windows.comm.rank]
                result = carried_out(windows, spec, REDUCTIONS[op], x, placement)
                alike(result)
                expected = every[0].double().numpy()
                with np.errstate(invalid="ignore"):
                    for one in every[1:]:
                        expected = function(expected, one.double().numpy())
                found = result.double().numpy()
                assert np.array_equal(found, expected, equal_nan=True), (op, dtype, length)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_long_tensors_pass_through_slots_of_the_usual_size(windows, alike, placement):
    length = 3 * window.SLOT_BYTES // 4 + 1001
    every = [values(length, rank, torch.float32) for rank in range(windows.size)]
    for name in ("window", "one_shot", "two_shot"):
        spec = spec_of("allreduce", name, length, windows.size)
        x = every[windows.comm.rank]
        result = carried_out(windows, spec, REDUCTIONS["sum"], x, placement)
        assert same_bits(result, in_rank_order(every))
        alike(result)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("name", ("window", "one_shot", "two_shot"))
def test_pieces_take_turns_from_call_to_call(small_slot, sums, windows, name, placement):
    """Odd and even numbers of pieces, new values each time, ranks that are late at times."""
    rank, whole = windows.comm.rank, SMALL_SLOT // 4
    for turn, length in enumerate((1, whole, whole + 1, 3 * whole, 9 * whole + 5, 2 * whole, 0)):
        spec = spec_of("allreduce", name, length, windows.size)
        x = placed(windows, length, torch.float32, placement)
        prepared = windows.prepare(spec, REDUCTIONS["sum"], x, ((0, length), (0, length)))
        for again in range(4):
            every = [
                values(length, r, torch.float32, 4 * turn + again) for r in range(windows.size)
            ]
            x.copy_(every[rank])
            if (turn + again + rank) % 3 == 0:
                time.sleep(0.001)
            if again == 0:
                windows.carry_out(spec, REDUCTIONS["sum"], x, 0, x, 0)
            elif again == 1:
                prepared.run()
            else:
                prepared.start().wait()
            assert same_bits(x, in_rank_order(every)), (length, again)
        prepared.free()


@pytest.mark.parametrize("rows", (0, 1, 2, 3))
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_one_rank_may_get_all_that_is_scattered(sums, windows, rows, placement):
    """Fewer elements than ranks: what rank 0 gets is the whole vector; the path must be one."""
    for length in (rows, rows * 30_000):
        spec = spec_of("reduce_scatter", "window", length, windows.size)
        bounds = (0, *([length] * windows.size))  # all belongs to rank 0
        spec = type(spec)("reduce_scatter", "window", torch.float32, bounds)
        every = [values(length, rank, torch.float32) for rank in range(windows.size)]
        x = every[windows.comm.rank]
        result = carried_out(windows, spec, REDUCTIONS["sum"], x, placement)
        assert same_bits(result, own_part(windows, spec, in_rank_order(every)))


def test_a_result_may_be_the_input(sums, windows):
    for placement in PLACEMENTS:
        for name in ("window", "one_shot", "two_shot"):
            every = [values(1001, rank, torch.float32) for rank in range(windows.size)]
            x = placed(windows, 1001, torch.float32, placement).copy_(every[windows.comm.rank])
            spec = spec_of("allreduce", name, 1001, windows.size)
            windows.carry_out(spec, REDUCTIONS["sum"], x, 0, x, 0)
            assert same_bits(x, in_rank_order(every)), (placement, name)


def test_a_window_may_begin_anywhere_in_a_tensor(sums, windows):
    """Views whose offsets differ from rank to rank, at odd elements."""
    size, rank = windows.size, windows.comm.rank
    for dtype in (torch.float32, torch.bfloat16):
        memory = windows.empty((300_100,), dtype).fill_(7)
        every = [values(299_999, r, dtype) for r in range(size)]
        x = memory[2 * rank + 1 :][:299_999].copy_(every[rank])
        spec = spec_of("allreduce", "window", 299_999, size, dtype)
        windows.carry_out(spec, REDUCTIONS["sum"], x, 0, x, 0)
        assert same_bits(x, in_rank_order(every))
        assert (memory[: 2 * rank + 1] == 7).all() and (memory[2 * rank + 300_000 :] == 7).all()


# --- ranks that disagree --------------------------------------------------------------------------


def differing(rank, what):
    """A spec of rank 1 that differs from all others' in one thing, and its reduction."""
    odd = rank == 1
    told = {
        "length": lambda: spec_of("allreduce", "window", 100 + odd, 4),
        "dtype": lambda: spec_of(
            "allreduce", "window", 100, 4, torch.int32 if odd else torch.float32
        ),
        "op": lambda: spec_of("allreduce", "window", 100, 4, op="max" if odd else "sum"),
        "algorithm": lambda: spec_of("allreduce", "one_shot" if odd else "window", 100, 4),
        "collective": lambda: spec_of("reduce_scatter" if odd else "allreduce", "window", 100, 4),
        "root": lambda: spec_of("broadcast", "window", 100, 4, root=int(odd)),
    }
    return told[what]()


@pytest.mark.ranks(2, 3, 4)
@pytest.mark.parametrize("placement", ("share", "ordinary"))
@pytest.mark.parametrize("what", ("length", "dtype", "op", "algorithm", "collective", "root"))
def test_ranks_that_disagree_all_raise_and_go_on(sums, windows, what, placement):
    """Also where each rank has made its own call before, and it stands in the cache."""
    size, rank = windows.size, windows.comm.rank

    def call(spec):
        n = spec.bounds[-1]
        x = placed(windows, n, spec.dtype, placement).fill_(1)
        reduction = NONE if spec.collective == "broadcast" else REDUCTIONS[spec.op]
        windows.carry_out(spec, reduction, x, 0, x, 0)
        return x

    def resized(spec):
        cut = spec_of(spec.collective, spec.algorithm, spec.bounds[-1], size, spec.dtype, spec.op)
        return type(spec)(
            *(getattr(cut, key) for key in ("collective", "algorithm", "dtype", "bounds", "op")),
            spec.facts,
        )

    for peer in (0, 1):  # all make both calls together first
        call(resized(differing(peer, what)))
    with pytest.raises(TensorError, match="disagree") as raised:
        call(resized(differing(rank, what)))
    texts = windows.world.gather_texts(str(raised.value))
    total = call(spec_of("allreduce", "window", 9, size))
    assert len(set(texts)) == 1, "one error on all ranks"
    assert f"rank {size - 1}: " in texts[0]
    assert total.tolist() == [size] * 9, "the group still works"


@pytest.mark.ranks(2, 3, 4)
def test_specs_are_agreed_on(sums, windows):
    same = spec_of("allreduce", "window", 7, windows.size)
    windows.agree(same)
    with pytest.raises(TensorError, match="disagree"):
        windows.agree(spec_of("allreduce", "window", 7 + windows.comm.rank, windows.size))
    windows.agree(same)


def test_calls_in_the_cache_are_few(windows, monkeypatch):
    monkeypatch.setattr(window.Windows, "MOST_CALLS", 4)
    for length in [*range(10), *range(10)]:
        x = windows.empty((length,), torch.float32).fill_(1)
        spec = spec_of("allreduce", "window", length, windows.size)
        windows.carry_out(spec, REDUCTIONS["sum"], x, 0, x, 0)
        assert (x == windows.size).all()
    assert len(windows._calls) == 4
    assert bits(x).numel() == 36
