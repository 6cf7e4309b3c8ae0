"""Every algorithm on every group size: any length, dtype and shape, against plain torch."""

from __future__ import annotations

import pytest
import torch

import mpmp
from mpmp.comm import carrier, plan
from mpmp.comm.buffer import DTYPES, FLOATS, INTEGERS
from mpmp.errors import ConfigError, TensorError
from mpmp.programs.collectives import COLLECTIVES
from mpmp.programs.partition import partition
from mpmp.programs.windows import WindowAlgorithm


def by_messages(collective):
    """Names of the algorithms that need no shared memory."""
    table = COLLECTIVES[collective]
    return [name for name, one in table.items() if not isinstance(one, WindowAlgorithm)]


LENGTHS = (0, 1, 2, 3, 7, 64, 1000)


@pytest.fixture(scope="module")
def group(world):
    return mpmp.mesh(tensor=world.size).tensor


def values(length, rank, dtype):
    """Small integers, exact in every dtype, different on every rank."""
    x = (torch.arange(length) * 7 + 3 * rank) % 11
    return (x % 2 if dtype is torch.bool else x).to(dtype)


def of_all(group, length, dtype):
    return torch.stack([values(length, rank, dtype) for rank in range(group.size)])


@pytest.mark.parametrize("slots", (True, False), ids=("slots", "plain"))
@pytest.mark.parametrize("algorithm", by_messages("allreduce"))
def test_allreduce_equals_the_sum(group, algorithm, slots, monkeypatch):
    monkeypatch.setattr(carrier, "SLOT_BYTES", 1 << 20 if slots else 0)
    for dtype in (*FLOATS, *INTEGERS):
        for length in LENGTHS:
            x = values(length, group.rank, dtype)
            before = x.clone()
            result = group.allreduce(x, algorithm=algorithm)
            expected = of_all(group, length, dtype).double().sum(0).to(dtype)
            assert torch.equal(result, expected), (dtype, length)
            assert torch.equal(x, before), "the input is left alone"


@pytest.mark.parametrize("algorithm", by_messages("allreduce"))
@pytest.mark.parametrize("op", ("max", "min"))
def test_allreduce_takes_other_operations(group, algorithm, op):
    x = torch.randn(33, generator=torch.Generator().manual_seed(group.rank))
    every = [torch.randn(33, generator=torch.Generator().manual_seed(r)) for r in range(group.size)]
    expected = getattr(torch.stack(every), f"a{op}")(0)
    assert torch.equal(group.allreduce(x, op=op, algorithm=algorithm), expected)


def test_allreduce_into_out_and_in_place(group):
    for length in (5, 200_000):
        x = values(length, group.rank, torch.float32)
        expected = of_all(group, length, torch.float32).sum(0)
        out = torch.empty_like(x)
        assert group.allreduce(x, out=out) is out
        group.allreduce(x, out=x)
        assert torch.equal(out, expected) and torch.equal(x, expected)
    with pytest.raises(TensorError, match="must agree"):
        group.allreduce(x, out=torch.empty(3))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_sixteen_bits_are_summed_in_float32_and_rounded_once(group, dtype):
    every = [
        torch.randn(999, generator=torch.Generator().manual_seed(r)).to(dtype)
        for r in range(group.size)
    ]
    expected = torch.stack(every).double().sum(0).float().to(dtype)
    for algorithm in by_messages("allreduce"):
        result = group.allreduce(every[group.rank], algorithm=algorithm)
        # One rounding of a float32 sum: at most one step from the double sum's rounding.
        assert (result.float() - expected.float()).abs().max() <= torch.finfo(dtype).eps * 4
        assert (result == expected).float().mean() > 0.99


@pytest.mark.parametrize("algorithm", by_messages("reduce_scatter"))
def test_reduce_scatter_gives_each_rank_its_rows(group, algorithm):
    for rows in (0, 1, 2, 5, 12):
        for dtype in (torch.float64, torch.bfloat16, torch.int32):
            x = values(rows * 3, group.rank, dtype).view(rows, 3)
            start, stop = partition(rows, group.size)[group.rank]
            expected = of_all(group, rows * 3, dtype).double().sum(0).to(dtype).view(rows, 3)
            result = group.reduce_scatter(x, algorithm=algorithm)
            assert torch.equal(result, expected[start:stop]), (rows, dtype)


@pytest.mark.parametrize("algorithm", by_messages("allgather"))
def test_allgather_puts_uneven_pieces_in_order(group, algorithm):
    lengths = [(3 * rank + 1) % 5 for rank in range(group.size)]
    for dtype in DTYPES:
        own = values(lengths[group.rank] * 2, group.rank, dtype).view(-1, 2)
        expected = [values(n * 2, r, dtype).view(-1, 2) for r, n in enumerate(lengths)]
        result = group.allgather(own, lengths, algorithm=algorithm)
        assert torch.equal(result, torch.cat(expected)), dtype
    even = group.allgather(torch.full((2,), group.rank))
    assert even.tolist() == [rank for rank in range(group.size) for _ in range(2)]
    with pytest.raises(TensorError, match="does not fit the lengths"):
        group.allgather(torch.zeros(2), [1] * group.size)


def test_broadcast_from_every_root(group):
    for root in range(group.size):
        for length in LENGTHS:
            result = group.broadcast(values(length, group.rank, torch.float32), root)
            assert torch.equal(result, values(length, root, torch.float32))
    with pytest.raises(TensorError, match="root"):
        group.broadcast(torch.zeros(1), group.size)


def test_any_shape_and_no_dims_at_all(group):
    x = torch.full((2, 3, 4), float(group.rank))
    assert group.allreduce(x).shape == (2, 3, 4)
    assert group.allreduce(torch.tensor(1.5)).item() == 1.5 * group.size
    with pytest.raises(TensorError, match="without dims"):
        group.reduce_scatter(torch.tensor(1.0))


@pytest.mark.parametrize(
    ("tensor", "cure"),
    [
        (lambda: torch.zeros(4, 4).t()[:3], "contiguous"),
        (lambda: torch.zeros(1).expand(4), "contiguous"),
        (lambda: torch.zeros(4, requires_grad=True), "detach"),
        (lambda: torch.zeros(4, dtype=torch.complex64), "complex64"),
        (lambda: torch.zeros(4, dtype=torch.complex64).conj().imag, "contiguous"),
        (lambda: torch.zeros(4).to_sparse(), "to_dense"),
        (lambda: torch.zeros(4, dtype=torch.bool), "bool"),
    ],
    ids=("transposed", "expanded", "with-grad", "complex", "strided", "sparse", "bool"),
)
def test_what_cannot_be_summed_is_refused_with_its_cure(group, tensor, cure):
    with pytest.raises(TensorError, match=cure):
        group.allreduce(tensor())


def test_long_messages_are_cut(group, monkeypatch):
    """The same code that keeps messages below 2^31 bytes, at pieces of 64 bytes."""
    monkeypatch.setattr(plan, "PIECE_BYTES", 64)
    for algorithm in by_messages("allreduce"):
        for length in (100, 8_001):
            x = values(length, group.rank, torch.float32)
            expected = of_all(group, length, torch.float32).sum(0)
            assert torch.equal(group.allreduce(x, algorithm=algorithm), expected)


@pytest.mark.slow
@pytest.mark.ranks(2, timeout=240)
def test_more_than_two_gibibytes(group):
    length = (1 << 31) + 16
    x = torch.full((length,), group.rank + 1, dtype=torch.uint8)
    result = group.broadcast(x, root=1)
    assert int(result[0]) == int(result[-1]) == 2
    assert bool((result[:: 1 << 20] == 2).all())
    total = group.allreduce(x, algorithm="recursive_doubling", out=result)
    assert int(total[0]) == int(total[-1]) == 3


@pytest.mark.ranks(2, 3, 4)
def test_ranks_that_disagree_all_raise(group):
    with pytest.raises(TensorError, match="rank 1: .*float64"):
        group.allreduce(torch.zeros(17, dtype=torch.float64 if group.rank == 1 else torch.float32))
    with pytest.raises(TensorError, match="disagree"):
        group.allreduce(torch.zeros(18 + group.rank))
    with pytest.raises(TensorError, match="disagree"):
        group.allreduce(torch.zeros(31), op="max" if group.rank == 0 else "min")
    assert group.allreduce(torch.ones(1)).item() == group.size, "the group still works"


def test_an_unknown_algorithm_offers_the_nearest(group):
    with pytest.raises(ConfigError, match='did you mean "ring"'):
        group.allreduce(torch.zeros(1), algorithm="rign")


@pytest.mark.ranks(2, 3, 4)
def test_trace_writes_one_line_a_message(world, capfd):
    mesh = mpmp.mesh(tensor=world.size)
    world.trace = True
    try:
        mesh.tensor.allreduce(torch.zeros(1000), algorithm="ring")
    finally:
        world.trace = False
    lines = [line for line in capfd.readouterr().err.splitlines() if "allreduce/ring" in line]
    assert len(lines) == 4 * (world.size - 1), "a send and a receive in each of 2 (p-1) rounds"
    assert all(line.startswith(f"[rank {world.rank}/{world.size} ") for line in lines)
    mesh.free()


@pytest.mark.ranks(4)
def test_groups_do_not_take_each_others_messages(world):
    mesh = mpmp.mesh(data=2, tensor=2)
    big = torch.full((50_000,), float(world.rank))
    prepared = mesh.data.prepare_allreduce(big)
    handle = prepared.start()
    small = mesh.tensor.allreduce(torch.full((50_000,), float(world.rank)))
    every = mesh.everyone.allreduce(torch.tensor([float(world.rank)]))
    handle.wait()
    assert bool((big == sum(mesh.data.ranks)).all())
    assert bool((small == sum(mesh.tensor.ranks)).all())
    assert every.item() == 6
    mesh.free()


@pytest.mark.ranks(1, 2, 3, 4)
def test_plans_and_slots_stay_few(world, monkeypatch):
    from mpmp.comm.executor import Executor

    monkeypatch.setattr(Executor, "MOST_PLANS", 8)
    monkeypatch.setattr(Executor, "MOST_SLOTS", 4)
    mesh = mpmp.mesh(tensor=world.size)
    for length in [*range(1, 40), *range(1, 40)]:
        x = torch.full((length,), 1.0)
        assert bool((mesh.tensor.allreduce(x, algorithm="ring") == world.size).all())
    assert len(mesh.tensor._now._plans) == 8 and len(mesh.tensor._now._slots) == 4
    mesh.free()


@pytest.mark.ranks(2, 3)
@pytest.mark.parametrize("root_is_longer", (True, False), ids=("longer", "shorter"))
def test_a_message_of_another_length_than_planned_is_never_taken(world, root_is_longer):
    """Both lengths were planned before, so nothing is compared; MPI alone would say nothing."""
    mesh = mpmp.mesh(tensor=world.size)
    for length in (4, 6):
        mesh.tensor.broadcast(torch.zeros(length), algorithm="binomial")
    is_root = mesh.tensor.rank == 0
    length = 6 if is_root == root_is_longer else 4
    if is_root:
        mesh.tensor.broadcast(torch.zeros(length), algorithm="binomial")
    else:
        with pytest.raises(TensorError, match="same shapes"):
            mesh.tensor.broadcast(torch.zeros(length), algorithm="binomial")


@pytest.mark.ranks(2, 3)
def test_windows_compare_every_call(world):
    """The same two lengths by windows: a difference is one error on all ranks, every time."""
    mesh = mpmp.mesh(tensor=world.size)
    for length in (4, 6):
        mesh.tensor.broadcast(torch.zeros(length))
        mesh.tensor.allreduce(torch.zeros(length), op="max")
    mine = 4 if mesh.tensor.rank == 0 else 6
    for _ in range(3):
        with pytest.raises(TensorError, match="disagree"):
            mesh.tensor.broadcast(torch.zeros(mine))
        with pytest.raises(TensorError, match="disagree"):
            mesh.tensor.allreduce(torch.zeros(4), op="max" if mesh.tensor.rank else "sum")
    assert mesh.tensor.allreduce(torch.ones(1)).item() == world.size


@pytest.mark.ranks(2)
@pytest.mark.parametrize(
    ("length", "words"), [(3, "12 B, this rank expects 16 B"), (5, "sent more than")]
)
def test_a_message_of_another_length_between_two_ranks_is_never_taken(world, length, words):
    mesh = mpmp.mesh(tensor=2)
    if world.rank == 0:
        mesh.tensor.send(torch.zeros(length), 1, 0).wait()
    mesh.everyone.barrier()  # so that the message is there before the wait
    if world.rank == 1:
        with pytest.raises(TensorError, match=words):
            mesh.tensor.receive(torch.zeros(4), 0, 0).wait()


def test_an_unknown_algorithm_among_the_settings_is_refused_at_once(world):
    from mpmp.comm.mesh import Mesh
    from mpmp.config import Comm

    with pytest.raises(ConfigError, match="no reduce_scatter algorithm"):
        Mesh.over(world, settings=Comm(reduce_scatter="nonsense"))


def test_out_takes_the_result_of_every_collective(group):
    size, rank = group.size, group.rank
    x = torch.arange(2.0 * size) + rank
    calls = {
        "allreduce": (x, torch.empty(2 * size)),
        "reduce_scatter": (x, torch.empty(2)),
        "allgather": (x[:2].clone(), torch.empty(2 * size)),
        "broadcast": (x, torch.empty(2 * size)),
        "scatter": (x, torch.empty(2)),
        "alltoall": (x, torch.empty(2 * size)),
        "reduce": (x, torch.empty(2 * size)),
        "gather": (x[:2].clone(), torch.empty(2 * size)),
    }
    for name, (given, out) in calls.items():
        expected = getattr(group, name)(given)
        found = getattr(group, name)(given, out=out)
        assert (found is None) == (expected is None)
        assert found is None or (found is out and torch.equal(out, expected)), name
        if found is not None:
            with pytest.raises(TensorError, match="must agree"):
                getattr(group, name)(given, out=out.double())


def test_arguments_that_do_not_fit_are_refused_at_the_call(group):
    size, x = group.size, torch.zeros(group.size + 1)
    refused = {
        "root": lambda: group.reduce(x, root=size),
        "not a rank": lambda: group.gather(x, root=-1),
        "does not fit the lengths": lambda: group.scatter(x, lengths=[1] * size),
        "does not fit": lambda: group.alltoall(x, [1] * size),
        "without dims": lambda: group.alltoall(torch.tensor(1.0)),
    }
    if size > 1:
        refused["send_lengths"] = lambda: group.alltoall(x)
        refused["over . ranks"] = lambda: group.alltoall(x, [-1] * (size - 1) + [2 * size])
    for words, call in refused.items():
        with pytest.raises(TensorError, match=words):
            call()
    with pytest.raises(ConfigError, match="same count for every rank"):
        group.alltoall(torch.zeros(size), [1] * size, algorithm="bruck")
    assert group.allreduce(torch.ones(1)).item() == size, "the group still works"


@pytest.mark.ranks(2, 3, 4)
def test_uneven_rows_that_differ_are_refused_on_all_ranks(group):
    x = torch.zeros((group.size, 2 + (group.rank == 1)))
    with pytest.raises(TensorError, match="rank 1: rows of 3"):
        group.alltoall(x, [1] * group.size)


def test_a_group_knows_the_hosts_of_its_ranks(group):
    assert group.hosts == (0,) * group.size


def test_the_choice_is_explained_once_a_plan(world, capfd):
    from mpmp.comm.mesh import Mesh
    from mpmp.config import Comm

    mesh = Mesh.over(world, tensor=world.size, settings=Comm(explain=True, broadcast="binomial"))
    for _ in range(3):
        mesh.tensor.allreduce(torch.zeros(1000))
        mesh.tensor.broadcast(torch.zeros(1000))
        mesh.tensor.allreduce(torch.zeros(1000), algorithm="ring")
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("tensor (")]
    mesh.free()
    if world.rank > 0 or world.size == 1:  # one rank has nothing to choose
        assert lines == []
        return
    assert len(lines) == 3
    assert "4,000 B float32" in lines[0]
    assert lines[1].endswith("binomial, set by --comm.broadcast")
    assert lines[2].endswith("ring, asked for at the call")


def test_a_table_is_read_by_the_first_rank_alone(world, tmp_path):
    from mpmp.comm.mesh import Mesh
    from mpmp.config import Comm
    from mpmp.programs.tuning import Table

    for text, words in ((None, "cannot be read"), ("{", "table")):
        path = tmp_path / "table.json"
        if text is not None:
            path.write_text(text)
        with pytest.raises(ConfigError, match=words):
            Mesh.over(world, settings=Comm(table=str(path)))
    path = tmp_path / "good.json"
    if world.rank == 0:
        path.write_text(Table("Some MPI 1.0").to_json())
    mesh = Mesh.over(world, tensor=world.size, settings=Comm(table=str(path)))
    assert mesh.tensor.allreduce(torch.ones(3)).tolist() == [world.size] * 3
    mesh.free()


def test_without_windows_a_window_algorithm_is_refused_with_the_reason(group):
    kept = group.windows
    group.share(None, "it was planted")
    try:
        with pytest.raises(ConfigError, match="share, which group .* it was planted"):
            group.allreduce(torch.zeros(3), algorithm="window")
    finally:
        group.share(kept, "")
