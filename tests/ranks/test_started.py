"""Operations that are started and waited for, and messages between two ranks."""

from __future__ import annotations

import time

import pytest
import torch

import mpmp
from mpmp.errors import LayoutError, PeerError, TensorError
from mpmp.programs.collectives import COLLECTIVES
from mpmp.programs.steps import Algorithm


@pytest.fixture(scope="module")
def mesh(world):
    return mpmp.mesh(tensor=world.size)


def test_a_started_sum_is_replayed_in_place(mesh):
    group = mesh.tensor
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        x = torch.zeros(1000, dtype=dtype)
        prepared = group.prepare_allreduce(x)
        for turn in range(3):
            x.fill_(group.rank + turn)
            prepared.start().wait()
            expected = sum(rank + turn for rank in range(group.size))
            assert bool((x == expected).all()), (dtype, turn)


def test_many_may_be_under_way(mesh):
    group = mesh.tensor
    buffers = [torch.full((n * 999,), float(group.rank)) for n in range(1, 9)]
    handles = [group.prepare_allreduce(x).start() for x in buffers]
    for handle in reversed(handles):
        handle.wait()
    assert all(bool((x == sum(range(group.size))).all()) for x in buffers)


def test_sums_side_by_side_do_not_take_each_other_s_messages(mesh):
    """All of one length, so that only their lanes tell them apart; those of a lane in turns."""
    group, count = mesh.tensor, 5
    buffers = [torch.empty(3 * 2**10) for _ in range(count)]
    prepared = [
        group.prepare_allreduce(x, algorithm=name)
        for x, name in zip(buffers, ("ring", "rabenseifner", "ring", "direct", "ring"), strict=True)
    ]
    for turn in range(20):
        for n, x in enumerate(buffers):
            x.fill_(float(group.rank + 100 * n + turn))
        handles = [one.start() for one in prepared]
        for handle in reversed(handles):
            handle.wait()
        expected = [sum(range(group.size)) + group.size * (100 * n + turn) for n in range(count)]
        for x, total in zip(buffers, expected, strict=True):
            assert bool((x == total).all()), turn


@pytest.mark.ranks(2)
def test_it_goes_on_while_the_rank_computes(mesh):
    """A thread makes progress: after a pause without any call of ours the sum is there."""
    x = torch.ones(1 << 16)
    prepared = mesh.tensor.prepare_allreduce(x, algorithm="ring")
    prepared.start().wait()
    handle = prepared.start()
    time.sleep(0.5)
    assert handle._done.is_set()
    handle.wait()
    assert bool((x == 4).all())


@pytest.mark.ranks(2, 3, 4)
def test_messages_travel_by_tag_whatever_their_order(mesh):
    group = mesh.tensor
    right, left = (group.rank + 1) % group.size, (group.rank - 1) % group.size
    sends = [
        group.send(torch.full((n,), float(group.rank)), right, tag)
        for tag, n in enumerate((3, 5, 70_000))
    ]
    for tag, n in ((2, 70_000), (0, 3), (1, 5)):
        x = torch.empty(n)
        group.receive(x, left, tag).wait()
        assert bool((x == left).all())
    for transfer in sends:
        transfer.wait()
        assert transfer.done()


@pytest.mark.ranks(2)
def test_a_message_may_be_asked_and_waited_for_again(mesh):
    group, x = mesh.tensor, torch.zeros(3)
    if group.rank == 0:
        group.send(torch.ones(3), 1, 0).wait()
        return
    transfer = group.receive(x, 0, 0)
    while not transfer.done():
        time.sleep(0.001)
    for _ in range(2):
        transfer.wait()
        assert transfer.done() and x.tolist() == [1.0] * 3
        x.fill_(1.0)


@pytest.mark.ranks(2)
def test_a_peer_that_does_not_answer_is_named(world):
    mesh = mpmp.mesh(tensor=2)
    limit, world.limit_s = world.limit_s, 1.2
    x = torch.zeros(4)
    try:
        if world.rank == 0:
            transfer = mesh.tensor.receive(x, 1, 0)
            with pytest.raises(PeerError, match="rank 1 .*timeout_s"):
                transfer.wait()
    finally:
        world.limit_s = limit
    mesh.everyone.barrier()
    # The receive still stands and would write into memory that is no longer its own.
    if world.rank == 0:
        transfer.wait()
        assert x.tolist() == [1.0] * 4
    else:
        mesh.tensor.send(torch.ones(4), 0, 0).wait()


def test_a_failing_started_operation_raises_where_it_is_waited_for(world):
    from mpmp.comm.progress import Progress

    def fail() -> None:
        raise PeerError("planted")

    for threaded in (True, False):
        handle = Progress(world.until, threaded).start(fail)
        with pytest.raises(PeerError, match="planted"):
            handle.wait()


def test_without_threads_operations_run_in_order_when_waited_for(world):
    """Started in a backward hook, a sum may need what this rank sends only afterwards."""
    from mpmp.comm.progress import Progress

    ran: list[int] = []
    progress = Progress(world.until, threaded=False)
    handles = [progress.start(lambda n=n: ran.append(n)) for n in range(3)]
    assert ran == []
    handles[1].wait()
    assert ran == [0, 1]
    handles[0].wait()
    handles[2].wait()
    assert ran == [0, 1, 2]


@pytest.mark.ranks(2)
def test_a_message_and_a_collective_of_one_length_do_not_meet(mesh):
    group = mesh.tensor
    if group.rank == 0:
        transfer = group.send(torch.full((4,), 9.0), 1, 0)
        total = group.allreduce(torch.ones(4))
        transfer.wait()
    else:
        total = group.allreduce(torch.ones(4))
        x = torch.zeros(4)
        group.receive(x, 0, 0).wait()
        assert x.tolist() == [9.0] * 4
    assert total.tolist() == [2.0] * 4
    with pytest.raises(TensorError, match="tag"):
        group.send(torch.zeros(1), 0, 32767)


@pytest.mark.ranks(1)
def test_axes_have_at_least_one_rank(world):
    for axes in ({"pipeline": 0}, {"data": -1, "tensor": -1}):
        with pytest.raises(LayoutError, match="at least one rank"):
            mpmp.mesh(**axes)


def test_freeing_a_mesh_ends_its_thread(world):
    mesh = mpmp.mesh(tensor=world.size)
    mesh.tensor.prepare_allreduce(torch.ones(3), algorithm="ring").start().wait()
    thread = mesh.tensor._progress._thread
    assert thread.is_alive()
    mesh.free()
    assert not thread.is_alive()


def test_every_collective_is_replayed_on_memory_that_stays(mesh):
    group = mesh.tensor
    size, rank = group.size, group.rank
    mine, total = torch.full((2,), float(rank)), float(sum(range(size)))
    everything = torch.arange(size).repeat_interleave(2).float()
    results = {
        "allreduce": [total] * 2 * size,
        "broadcast": [0.0] * 2 * size,
        "reduce_scatter": [total] * 2,
        "allgather": everything.tolist(),
        "scatter": [0.0] * 2,
        "alltoall": everything.tolist(),
        "reduce": [total] * 2 * size,
        "gather": everything.tolist(),
    }
    for name, expected in results.items():
        x = torch.full((2 * size * (1 + (name == "alltoall")),), -1.0)
        # Windows have operations of their own; these are the ones that are replayed by messages.
        algorithm = next(a for a, one in COLLECTIVES[name].items() if isinstance(one, Algorithm))
        prepared = group.prepare(name, x, algorithm=algorithm)
        for turn in range(4):
            prepared.input.fill_(mine[0])
            prepared.run() if turn % 2 else prepared.start().wait()
            if rank == 0 or name not in ("reduce", "gather"):
                assert prepared.output.tolist() == expected, name
        prepared.free()
        with pytest.raises(TensorError, match="freed"):
            prepared.run()
    group.prepare("barrier", torch.zeros(1)).run()


def test_a_prepared_sum_runs_while_another_is_under_way(mesh):
    group = mesh.tensor
    first, second = torch.ones(300_000), torch.ones(300_000)
    handle = group.prepare_allreduce(first).start()
    now = group.prepare_allreduce(second)
    now.run()
    now.run()
    handle.wait()
    assert bool((first == group.size).all()) and bool((second == group.size**2).all())


def test_what_nobody_holds_any_more_is_freed_at_the_next_bind(mesh):
    import gc

    group = mesh.tensor
    for _ in range(5):
        group.prepare_allreduce(torch.ones(1000)).start().wait()
    gc.collect()
    group.prepare_allreduce(torch.ones(1000)).start().wait()
    gc.collect()
    assert len(group._started._bound) <= 3
