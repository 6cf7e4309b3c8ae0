"""Windows in GPU memory between ranks that share a card, or have one each."""

from __future__ import annotations

import pytest
import torch
from mpmp_kernels import reference
from torch import Tensor

from gpu.measure import median_of_allreduce, ways
from mpmp.comm import device_pieces
from mpmp.comm.device_memory import BLOCK_BYTES
from mpmp.comm.device_window import DeviceWindows
from mpmp.comm.reductions import NONE, REDUCTIONS
from mpmp.comm.spec import Spec
from mpmp.comm.world import World
from mpmp.programs.partition import partition

pytestmark = pytest.mark.ranks(2, 4)

SUM, AVG = REDUCTIONS["sum"], REDUCTIONS["avg"]
SUMMED = (torch.float32, torch.float16, torch.bfloat16)
HOMES = ("window", "ordinary", "mixed")
LENGTHS = (1, 1001, 300_000)
SLOT_BYTES = 1 << 18
"""Small here, so that a tensor goes in several pieces."""


@pytest.fixture(autouse=True)
def _small_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_pieces, "SLOT_BYTES", SLOT_BYTES)


def values(length: int, rank: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * rank + length)
    return torch.randn(length, generator=generator).mul(2.0 ** (rank % 3)).to(dtype)


def everyone(windows: DeviceWindows, length: int, dtype: torch.dtype) -> list[Tensor]:
    return [values(length, rank, dtype) for rank in range(windows.comm.size)]


def total(all_: list[Tensor], divide: float = 1.0) -> Tensor:
    found = torch.empty_like(all_[0])
    reference.sum_publish(all_, [found], divide)
    return found


def put(windows: DeviceWindows, x: Tensor, home: str) -> Tensor:
    """The tensor on the card, in the window or out of it, produced late."""
    device = windows.card.device
    there = x.to(device)
    inside = home == "window" or (home == "mixed" and windows.comm.rank == 0)
    found = windows.empty(x.shape, x.dtype) if inside else torch.empty_like(there)
    assert found is not None
    torch.cuda._sleep(2_000_000 * (windows.comm.rank + 1))
    return found.copy_(there)


def spec_of(
    windows: DeviceWindows, collective: str, dtype: torch.dtype, length: int, **facts: int
) -> Spec:
    bounds = (0, *(stop for _, stop in partition(length, windows.comm.size)))
    return Spec(collective, "window", dtype, bounds, "sum", tuple(facts.items()))


def same(found: Tensor, wanted: Tensor) -> bool:
    return torch.equal(found.cpu().view(torch.uint8), wanted.view(torch.uint8))


@pytest.mark.parametrize("home", HOMES)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("dtype", SUMMED)
def test_sums(windows: DeviceWindows, dtype: torch.dtype, length: int, home: str) -> None:
    all_, rank = everyone(windows, length, dtype), windows.comm.rank
    start, stop = partition(length, windows.comm.size)[rank]
    x = put(windows, all_[rank], home)
    piece = torch.empty(stop - start, dtype=dtype, device=x.device)
    windows.carry_out(spec_of(windows, "reduce_scatter", dtype, length), SUM, x, 0, piece, start)
    other = put(windows, torch.zeros_like(all_[0]), "window")
    windows.carry_out(spec_of(windows, "allreduce", dtype, length), SUM, x, 0, other, 0)
    untouched = x.clone()
    windows.carry_out(spec_of(windows, "allreduce", dtype, length), AVG, x, 0, x, 0)
    wanted = total(all_)
    assert same(piece, wanted[start:stop])
    assert same(other, wanted)
    assert same(untouched, all_[rank])
    # The card divides a float32, then rounds; so does the reference.
    assert same(x, total(all_, windows.comm.size))


@pytest.mark.parametrize("home", HOMES)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("dtype", (torch.float64, torch.int8))
def test_copies(windows: DeviceWindows, dtype: torch.dtype, length: int, home: str) -> None:
    rank, size = windows.comm.rank, windows.comm.size
    all_ = [(values(length, one, torch.float64) * 10).to(dtype) for one in range(size)]
    x = put(windows, all_[rank], home)
    gathered = torch.empty(length * size, dtype=dtype, device=x.device)
    bounds = tuple(length * one for one in range(size + 1))
    spec = Spec("allgather", "window", dtype, bounds)
    windows.carry_out(spec, NONE, x, bounds[rank], gathered, 0)
    sent = []
    for root in range(size):
        result = torch.empty_like(x)
        spec = spec_of(windows, "broadcast", dtype, length, root=root)
        windows.carry_out(spec, NONE, x, 0, result, 0)
        sent.append(result)
    assert same(gathered, torch.cat(all_))
    assert all(same(one, wanted) for one, wanted in zip(sent, all_, strict=True))


def test_blocks_that_come_later(windows: DeviceWindows) -> None:
    rank, length = windows.comm.rank, BLOCK_BYTES // 4 + 100
    kept = [windows.empty((length,), torch.float32) for _ in range(rank)]
    x = put(windows, torch.full((length,), rank + 1.0), "window")
    spec = spec_of(windows, "allreduce", torch.float32, length)
    windows.carry_out(spec, SUM, x, 0, x, 0)
    assert len(kept) == rank
    assert (x == windows.comm.size * (windows.comm.size + 1) / 2).all()


def test_started_sums_run_beside_the_computation(windows: DeviceWindows) -> None:
    rank, size, length = windows.comm.rank, windows.comm.size, 100_000
    x = windows.empty((length,), torch.float32)
    assert x is not None
    spec, whole = spec_of(windows, "allreduce", torch.float32, length), (0, length)
    prepared = windows.prepare(spec, SUM, x, (whole, whole))
    found = []
    for step in range(5):
        torch.cuda._sleep(20_000_000)
        x.fill_(rank + step)
        handle = prepared.start()
        torch.cuda._sleep(20_000_000)  # backward goes on
        handle.wait()
        with torch.cuda.stream(torch.cuda.Stream(x.device)):  # a consumer on any stream
            found.append((x * 1).cpu())
    for step, one in enumerate(found):
        assert (one == size * (size - 1) / 2 + size * step).all()


@pytest.mark.ranks(2, timeout=100)
def test_64_mib_go_three_times_as_fast_as_staged(world: World, windows: DeviceWindows) -> None:
    seconds = {
        name: median_of_allreduce(world, allreduce, empty(16 << 20))
        for name, allreduce, empty in ways(world, windows)
        if name in ("staged", "ipc, in a window")
    }
    assert seconds["staged"] >= 3 * seconds["ipc, in a window"], seconds


# --- tensors that are still being produced --------------------------------------------------------


def wrong_sums(windows: DeviceWindows, num: int, length: int, busy: int) -> int:
    """Elements that came out wrong of sums whose tensors were not there yet when they began.

    The ranks take turns in being late, by up to ten kernels of ``busy`` cycles.
    """
    rank, size = windows.comm.rank, windows.comm.size
    spec = spec_of(windows, "allreduce", torch.float32, length)
    x = windows.empty((length,), torch.float32)
    assert x is not None
    wrong = torch.zeros((), dtype=torch.int64, device=x.device)
    for step in range(num):
        if step % size == rank:
            for _ in range(1 + step // size % 10):
                torch.cuda._sleep(busy)
        x.fill_(rank + step % 1000)
        windows.carry_out(spec, SUM, x, 0, x, 0)
        wrong += (x != size * (size - 1) // 2 + size * (step % 1000)).sum()
    return sum(map(int, windows.world.gather_texts(str(wrong.item()))))


@pytest.mark.ranks(2, timeout=150)
@pytest.mark.parametrize("length", (1 << 10, 1 << 18))
def test_ten_thousand_sums_of_tensors_still_being_produced(
    windows: DeviceWindows, length: int
) -> None:
    assert wrong_sums(windows, 5_000, length, busy=20_000) == 0


def test_a_missing_fence_is_seen(windows: DeviceWindows, monkeypatch: pytest.MonkeyPatch) -> None:
    with_fence = wrong_sums(windows, 40, 1 << 18, busy=4_000_000)
    monkeypatch.setattr(windows, "fence", lambda: None)
    without = wrong_sums(windows, 40, 1 << 18, busy=4_000_000)
    assert with_fence == 0
    assert without > 0
