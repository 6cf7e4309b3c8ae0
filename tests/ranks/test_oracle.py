"""Every algorithm of every collective against NumPy: dtypes, lengths, group sizes 1 to 5.

Values are small integers, exact in every dtype, so that equality is asked for everywhere; what all
ranks have in common is also compared between them, bit by bit.
"""

from __future__ import annotations

import hashlib
import time
from itertools import product

import numpy as np
import pytest
import torch

import mpmp
from mpmp.comm.buffer import DTYPES
from mpmp.programs.collectives import COLLECTIVES
from mpmp.programs.partition import partition
from mpmp.programs.windows import WindowAlgorithm

LONG = (1 << 20) + 3
EVERYWHERE = pytest.mark.ranks(1, 2, 3, 4, 5, timeout=240)
NUMPY = {"sum": np.sum, "max": np.max, "min": np.min, "prod": np.prod}

pytestmark = EVERYWHERE


def by_messages(*collectives):
    """(collective, algorithm) pairs that need no shared memory."""
    return [
        pytest.param(collective, name, id=f"{collective}-{name}")
        for collective in collectives
        for name, algorithm in COLLECTIVES[collective].items()
        if not isinstance(algorithm, WindowAlgorithm)
    ]


@pytest.fixture(scope="module")
def group(world):
    mesh = mpmp.mesh(tensor=world.size)
    yield mesh.tensor
    mesh.free()


@pytest.fixture
def alike(group):
    """Called with what all ranks must have in common; compared when the test is over."""
    digest = hashlib.sha256()

    def note(x):
        digest.update(x.contiguous().view(-1).view(torch.uint8).numpy().tobytes())

    yield note
    texts = group._now.world.gather_texts(digest.hexdigest(), group.communicator)
    assert len(set(texts)) == 1, "the ranks' results differ in their bits"


QUICK = (torch.float32, torch.bfloat16, torch.int64)
REST = tuple(dtype for dtype in DTYPES if dtype not in QUICK)


def both(*pairs):
    """Each pair with the usual dtypes, and in the slow run with all the others."""
    return pytest.mark.parametrize(
        ("collective", "algorithm", "dtypes"),
        [
            pytest.param(*pair.values, dtypes, id=f"{pair.id}-{name}", marks=marks)
            for pair in pairs
            for name, dtypes, marks in (("usual", QUICK, ()), ("rest", REST, pytest.mark.slow))
        ],
    )


def lengths_of(size):
    return sorted({0, 1, size - 1, size, size + 1, 1001})


def array(length, rank):
    return 1 + (np.arange(length) * 7 + 3 * rank) % 2


def tensor(length, rank, dtype):
    return torch.from_numpy(array(length, rank)).to(dtype)


def same(result, expected):
    return np.array_equal(result.double().numpy(), expected)


def every(group, length):
    return np.stack([array(length, rank) for rank in range(group.size)])


@both(*by_messages("allreduce", "reduce", "reduce_scatter"))
def test_reductions(group, alike, collective, algorithm, dtypes):
    for dtype, length in product(dtypes, lengths_of(group.size)):
        if dtype is torch.bool:
            continue
        ops = NUMPY if dtype in (torch.float32, torch.bfloat16) else {"sum": np.sum}
        for op, numpy in ops.items():
            x = tensor(length, group.rank, dtype)
            expected = numpy(every(group, length), axis=0)
            if collective == "allreduce":
                result = group.allreduce(x, op, algorithm)
                alike(result)
            elif collective == "reduce_scatter":
                result = group.reduce_scatter(x, op, algorithm)
                start, stop = partition(length, group.size)[group.rank]
                expected = expected[start:stop]
            else:
                root = length % group.size
                result = group.reduce(x, root, op, algorithm)
                assert (result is None) == (group.rank != root)
                if result is None:
                    continue
            assert result.dtype == dtype
            assert same(result, expected), (dtype, length, op)


@both(*by_messages("allgather", "gather"))
def test_gathers(group, alike, collective, algorithm, dtypes):
    for dtype, length in product(dtypes, lengths_of(group.size)):
        even = [length] * group.size
        uneven = [(length + 3 * rank) % (length + 2) for rank in range(group.size)]
        for lengths in (even, uneven):
            x = tensor(lengths[group.rank] * 2, group.rank, dtype).view(-1, 2)
            told = None if lengths is even else lengths
            if collective == "allgather":
                result = group.allgather(x, told, algorithm)
                alike(result)
            else:
                root = length % group.size
                result = group.gather(x, root, told, algorithm)
                assert (result is None) == (group.rank != root)
            expected = [tensor(n * 2, r, dtype).view(-1, 2) for r, n in enumerate(lengths)]
            if result is not None:
                assert torch.equal(result, torch.cat(expected)), (dtype, lengths)


@both(*by_messages("broadcast", "scatter"))
def test_from_every_root(group, alike, collective, algorithm, dtypes):
    for dtype, length in product(dtypes, lengths_of(group.size)):
        for root in range(group.size) if dtype is torch.float32 else [length % group.size]:
            x = tensor(length, group.rank, dtype)
            whole = tensor(length, root, dtype)
            if collective == "broadcast":
                result = group.broadcast(x, root, algorithm)
                assert torch.equal(result, whole), (dtype, length, root)
                alike(result)
                continue
            pieces = [stop - start for start, stop in partition(length, group.size)]
            for lengths in (pieces, pieces[::-1], [0] * (group.size - 1) + [length]):
                result = group.scatter(x, root, lengths, algorithm)
                expected = whole.split(lengths)[group.rank]
                assert torch.equal(result, expected), (dtype, lengths, root)


@both(*by_messages("alltoall"))
def test_alltoall(group, collective, algorithm, dtypes):
    for dtype, each in product(dtypes, (0, 1, 2, 7, 200)):
        length = each * group.size
        result = group.alltoall(tensor(length * 3, group.rank, dtype).view(-1, 3), None, algorithm)
        mine = slice(group.rank * each, (group.rank + 1) * each)
        expected = [tensor(length * 3, r, dtype).view(-1, 3)[mine] for r in range(group.size)]
        assert torch.equal(result, torch.cat(expected)), (dtype, each)


@pytest.mark.parametrize("seed", range(4))
def test_alltoall_with_uneven_counts(group, seed):
    counts = np.random.default_rng(seed).integers(0, 4 + 300 * (seed % 2), (group.size,) * 2)
    counts[seed % group.size] = 0  # one rank sends nothing
    for dtype in DTYPES:
        whole = [tensor(int(counts[rank].sum()) * 2, rank, dtype) for rank in range(group.size)]
        pieces = [x.view(-1, 2).split(counts[rank].tolist()) for rank, x in enumerate(whole)]
        x = whole[group.rank].view(-1, 2)
        result = group.alltoall(x, counts[group.rank].tolist())
        assert torch.equal(result, torch.cat([piece[group.rank] for piece in pieces]))


@pytest.mark.parametrize(("collective", "algorithm"), by_messages("barrier"))
def test_barrier_lets_nobody_go_before_all_have_come(group, collective, algorithm):
    for late in range(group.size):
        if group.rank == late:
            time.sleep(0.02)
        came = time.time()
        group.barrier(algorithm)
        went = time.time()
        times = group.allgather(torch.tensor([came, went], dtype=torch.float64)).view(-1, 2)
        assert times[:, 0].max() <= times[:, 1].min()


def run_long(group, collective, algorithm):
    x = tensor(LONG, group.rank, torch.float32)
    total = every(group, LONG).sum(0)
    pieces = partition(LONG, group.size)
    own = slice(*pieces[group.rank])
    if collective == "allreduce":
        return group.allreduce(x, algorithm=algorithm), total
    if collective == "reduce":
        return group.reduce(x, 0, algorithm=algorithm), total
    if collective == "reduce_scatter":
        return group.reduce_scatter(x, algorithm=algorithm), total[own]
    if collective == "broadcast":
        return group.broadcast(x, group.size - 1, algorithm), array(LONG, group.size - 1)
    if collective == "scatter":
        return group.scatter(x, 0, algorithm=algorithm), array(LONG, 0)[own]
    if collective == "alltoall":
        whole = LONG // group.size * group.size
        x, each = x[:whole], whole // group.size
        mine = slice(group.rank * each, (group.rank + 1) * each)
        expected = [array(whole, r)[mine] for r in range(group.size)]
        return group.alltoall(x, None, algorithm), np.concatenate(expected)
    lengths = [stop - start for start, stop in pieces]
    expected = np.concatenate([array(n, r) for r, n in enumerate(lengths)])
    return getattr(group, collective)(
        x[: lengths[group.rank]].copy_(tensor(lengths[group.rank], group.rank, torch.float32)),
        lengths=lengths,
        algorithm=algorithm,
    ), expected


MOVING = [name for name in COLLECTIVES if name != "barrier"]


@pytest.mark.slow
@pytest.mark.parametrize(("collective", "algorithm"), by_messages(*MOVING))
def test_long_vectors(group, collective, algorithm):
    result, expected = run_long(group, collective, algorithm)
    if result is not None:
        assert same(result, expected)


@pytest.mark.parametrize(
    ("collective", "algorithm"),
    [("allreduce", "ring"), ("allreduce", "recursive_doubling"), ("broadcast", "binomial")],
)
def test_some_long_vectors(group, collective, algorithm):
    result, expected = run_long(group, collective, algorithm)
    assert same(result, expected)
