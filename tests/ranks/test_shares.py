"""Memory that ranks share: leases, operations on it again and again, and what ends when."""

from __future__ import annotations

import gc
import time
import weakref

import pytest
import torch

from mpmp.comm.reductions import REDUCTIONS
from mpmp.comm.share import PAGE_BYTES, open_shares
from ranks.windowed import PLACEMENTS, in_rank_order, placed, same_bits, spec_of, values

pytestmark = pytest.mark.ranks(1, 2, 3, 4, timeout=40)
SUM = REDUCTIONS["sum"]


def operation(windows, name, length, placement="share", dtype=torch.float32):
    spec = spec_of("allreduce", name, length, windows.size, dtype)
    buffer = placed(windows, length, dtype, placement)
    return windows.prepare(spec, SUM, buffer, ((0, length), (0, length)))


def fill(op, seed):
    """New values of this rank; what they must become."""
    size, n, dtype = op.windows.size, op.output.numel(), op.output.dtype
    every = [values(n, rank, dtype, seed) for rank in range(size)]
    op.output.copy_(every[op.windows.comm.rank])
    return in_rank_order(every)


def dawdle(rank, turn):
    """Every rank is late at times, each at others."""
    if (turn * 7 + rank * 3) % 23 == 0:
        time.sleep(0.0002 * ((turn + rank) % 4))


# --- operations -----------------------------------------------------------------------------------


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("name", ("window", "one_shot", "two_shot"))
def test_thousands_of_replays_each_with_new_values(windows, name, placement):
    turns = 1500 if windows.size <= 2 else 300
    for length in (1, 37, 5000):
        op = operation(windows, name, length, placement)
        for turn in range(turns // 3):
            expected = fill(op, turn)
            dawdle(windows.comm.rank, turn)
            if turn % 2:
                op.run()
            else:
                op.start().wait()
            assert same_bits(op.output, expected), (length, turn)
        op.free()


def test_replays_without_a_compiler(windows, monkeypatch):
    from mpmp.comm import lane

    monkeypatch.setattr(lane, "kernels", lambda: None)
    for name in ("window", "one_shot", "two_shot"):
        op = operation(windows, name, 50)
        for turn in range(150):
            expected = fill(op, turn)
            dawdle(windows.comm.rank, turn)
            op.run()
            assert same_bits(op.output, expected), (name, turn)


@pytest.mark.ranks(2, 3)
def test_ranks_with_and_without_a_compiler_meet(windows, monkeypatch):
    from mpmp.comm import lane

    if windows.comm.rank == 0:
        monkeypatch.setattr(lane, "kernels", lambda: None)
    for name in ("window", "one_shot", "two_shot"):
        op = operation(windows, name, 3000)
        for turn in range(50):
            expected = fill(op, turn)
            op.run()
            assert same_bits(op.output, expected), (name, turn)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_several_started_at_once_are_waited_for_in_any_order(sums, windows, placement):
    lengths = (3, 700, 0, 4000)
    ops = [
        operation(windows, name, length, placement)
        for length in lengths
        for name in ("window", "one_shot", "two_shot")
    ]
    rank = windows.comm.rank
    for turn in range(12):
        expected = [fill(op, 10 * turn + number) for number, op in enumerate(ops)]
        for op in ops:
            op.start()
        for at in range(len(ops)):
            dawdle(rank, turn + at)
            ops[(at * (2 * (rank % 2) - 1) + rank) % len(ops)].wait()
        for number, op in enumerate(ops):
            assert same_bits(op.output, expected[number]), (turn, number)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_started_operation_may_be_waited_for_after_other_calls(windows, placement):
    """On one rank before a call, on the others after it."""
    op = operation(windows, "window", 100, placement)
    other = operation(windows, "window", 10, placement)
    spec = spec_of("allreduce", "window", 50, windows.size)
    for turn in range(20):
        expected, of_other = fill(op, turn), fill(other, turn + 100)
        x = torch.ones(50)
        op.start()
        first = (windows.comm.rank + turn) % 2 == 0
        if first:
            op.wait()
        windows.carry_out(spec, SUM, x, 0, x, 0)
        other.run()
        if not first:
            op.wait()
        assert same_bits(op.output, expected) and same_bits(other.output, of_other)
        assert (x == windows.size).all()


@pytest.mark.ranks(2, 3, 4)
def test_a_lane_stays_until_the_slowest_has_read_it(windows):
    """Rank 0 is done with a one-shot sum that the others have started but not taken yet."""
    size, rank = windows.size, windows.comm.rank
    spec = spec_of("allreduce", "window", 50, size)
    for turn in range(10):
        op = operation(windows, "one_shot", 2000)
        expected = fill(op, turn)
        op.start()
        if rank == 0:
            op.wait()
            op.free()
            mine = op.output.clone()
            del op
        x = torch.ones(50)
        windows.carry_out(spec, SUM, x, 0, x, 0)
        if rank == 0:
            overwritten = [windows.empty((n,), torch.float32).fill_(-1.0) for n in (2000, 8000)]
            assert all((one == -1).all() for one in overwritten)
        windows.agree(spec)  # the others read only now
        if rank > 0:
            op.wait()
            mine = op.output.clone()
            op.free()
            del op
        assert same_bits(mine, expected), turn


@pytest.mark.ranks(2, 3, 4)
def test_operations_end_at_different_times_on_different_ranks(windows):
    rank, kept = windows.comm.rank, []
    spec = spec_of("allreduce", "window", 20, windows.size)
    for turn in range(60):
        op = operation(windows, ("window", "one_shot", "two_shot")[turn % 3], 500 + turn)
        expected = fill(op, turn)
        op.run()
        assert same_bits(op.output, expected), turn
        kept.append(op)
        del op
        if (turn + rank) % 3 == 0:
            kept.pop(turn % len(kept)).free()
        elif (turn + rank) % 5 == 0:
            kept.clear()
            gc.collect()
        x = torch.full((20,), float(turn))
        windows.carry_out(spec, SUM, x, 0, x, 0)
        assert (x == turn * windows.size).all()


def test_lanes_of_operations_that_are_gone_are_given_back(windows):
    """Thousands of short-lived operations take no more room than a few."""
    spec = spec_of("allreduce", "window", 20, windows.size)
    tops, heap, before = [], windows.shares._heap, len(windows.shares.kept)
    for turn in range(40):
        op = operation(windows, "one_shot", 20_000)
        fill(op, turn)
        op.run()
        op.free()
        del op
        x = torch.ones(20)
        windows.carry_out(spec, SUM, x, 0, x, 0)
        tops.append(heap._top)
    assert tops[-1] == tops[5], "room is used again"
    assert len(windows.shares.kept) <= before + 1


@pytest.mark.ranks(2, 3)
def test_an_operation_under_way_is_not_begun_again(windows):
    """Two starts are two sums, or an error on all ranks; one sum in silence would be wrong."""
    from mpmp.errors import TensorError

    op = operation(windows, "window", 10)
    op.output.fill_(1)
    op.start()
    try:
        op.start()
        op.wait()
        op.wait()
    except TensorError:
        op.wait()
        sums = 1
    else:
        sums = 2
    assert (op.output == float(windows.size**sums)).all()


# --- memory ---------------------------------------------------------------------------------------


def test_a_tensor_of_any_shape_and_dtype(windows):
    for shape in ((), (0,), (1,), (3, 0, 2), (7, 5), (2, 3, 4)):
        for dtype in (torch.float64, torch.bfloat16, torch.int8, torch.bool):
            x = windows.empty(shape, dtype)
            assert x.shape == shape and x.dtype == dtype and x.is_contiguous()
            x.fill_(1)
            assert x.sum() == x.numel()
            if x.numel():
                assert windows.shares.offset(x) % PAGE_BYTES == 0
    assert windows.empty((1 << 60,), torch.float64) is None, "there is no such room"
    assert windows.shares.offset(torch.zeros(3)) == -1


def test_memory_lives_as_long_as_its_storage(windows):
    heap = windows.shares._heap
    x = windows.empty((1000,), torch.float32).fill_(3)
    start = windows.shares.offset(x)
    part = x.view(10, 100)[3:5]
    del x
    gc.collect()
    taken = [windows.empty((1000,), torch.float32).fill_(9) for _ in range(4)]
    assert (part == 3).all(), "a view keeps it"
    storage = weakref.ref(part.untyped_storage())
    del part, taken
    gc.collect()
    assert storage() is None
    again = windows.empty((1000,), torch.float32)
    assert windows.shares.offset(again) <= start, "first fit: the place is used again"
    assert heap._returned.maxlen is None


def gradient_of_two_microbatches(windows):
    """d/dw of sum((w x_1)^2) where the activation w x_1 is summed in a window and saved there."""
    size, rank = windows.size, windows.comm.rank
    spec = spec_of("allreduce", "window", 2000, size)

    def activation(seed):
        y = windows.empty((2000,), torch.float32)
        y.copy_(values(2000, rank, torch.float32, seed))
        windows.carry_out(spec, SUM, y, 0, y, 0)
        return y

    w = torch.full((2000,), 2.0, requires_grad=True)
    loss = (w * activation(1)).sum()  # saves the activation for backward, and nothing else has it
    gc.collect()
    activation(2)  # the next microbatch's
    loss.backward()
    every = [values(2000, r, torch.float32, 1) for r in range(size)]
    return w.grad, in_rank_order(every)


def test_what_is_saved_for_backward_keeps_its_place(windows):
    gradient, expected = gradient_of_two_microbatches(windows)
    assert same_bits(gradient, expected)


def test_the_violation_of_a_lease_is_seen(windows, monkeypatch):
    """The same with places that are given back at once: autograd says nothing, the sum is wrong."""
    shares = windows.shares
    take = shares.empty

    def given_back_at_once(nbytes):
        tensor = take(nbytes)
        shares._heap.give_back(shares.offset(tensor), nbytes)
        return tensor

    before = shares._heap._free.copy(), shares._heap._top
    with monkeypatch.context() as patch:
        patch.setattr(shares, "empty", given_back_at_once)
        patch.setattr(shares._heap, "_free", [])
        patch.setattr(shares._heap, "_returned", type(shares._heap._returned)())
        # A heap of its own, beyond all that is in use, which is forgotten afterwards.
        gradient, expected = gradient_of_two_microbatches(windows)
    wrong = not torch.equal(gradient, expected)
    gc.collect()
    shares._heap._returned.clear()
    shares._heap._free[:] = before[0]
    assert wrong, "the test above would not notice"


def test_one_rank_of_a_host_is_the_first_to_ask_however_close_they_ask(windows):
    comm, firsts = windows.comm, []
    for _ in range(20):
        shares, why = open_shares(comm, windows.ranks)
        assert shares is not None, why
        comm.Barrier()
        firsts.append((shares.is_first(), shares.is_first()))
    said = comm.allgather(firsts)
    for turn in range(20):
        assert sum(theirs[turn][0] for theirs in said) == 1
        assert not any(theirs[turn][1] for theirs in said)
