"""Windows in GPU memory, tried without a GPU.

A pretended card keeps its memory in files that other ranks map, as IPC would let them, and its
kernels and copies in a queue until somebody waits for the stream. A sum of tensors that are not
there yet, or a result that is read too early, comes out wrong, and the test sees it.
"""

from __future__ import annotations

import ctypes
import dataclasses
import mmap
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from mpmp_kernels import reference
from torch import Tensor

from mpmp.comm import device_memory, device_path, device_pieces, reductions
from mpmp.comm.carrier import places_of
from mpmp.comm.device_memory import HANDLE_BYTES, Card, CardError, Lease, Pool
from mpmp.comm.device_path import DeviceWays, open_windows, size_class
from mpmp.comm.device_window import DeviceWindows
from mpmp.comm.mesh import Mesh
from mpmp.comm.progress import Progress
from mpmp.comm.spec import Spec
from mpmp.comm.world import World
from mpmp.errors import ConfigError, TensorError
from mpmp.programs.partition import partition

pytestmark = pytest.mark.ranks(2, 3)

GPU = torch.device("cuda", 0)
BLOCK_BYTES, SLOT_BYTES = 1 << 16, 1 << 11
LENGTHS = (0, 1, 130, 5000)
"""Nothing, less than a rank each, less than a slot, many slots."""
HOMES = ("window", "ordinary", "mixed")
DTYPES = (torch.float32, torch.bfloat16)
SUM, AVG, NONE = reductions.REDUCTIONS["sum"], reductions.REDUCTIONS["avg"], reductions.NONE


class PretendedCard(Card):
    """Memory in files of ``folder``; each thread has a stream of its own."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.device, self.folder, self.rank = GPU, folder, rank
        self.maps: list[mmap.mmap] = []
        self.events: list[str] = []
        self.opened: dict[bytes, int] = {}
        self._streams = threading.local()

    @property
    def queue(self) -> list[Callable[[], object]]:
        found: list[Callable[[], object]] = self._streams.__dict__.setdefault("queue", [])
        return found

    def allocate(self, nbytes: int) -> int:
        file = self.folder / f"{self.rank}.{len(self.maps)}"
        file.write_bytes(bytes(nbytes))
        return self._map(file)

    def export(self, address: int) -> bytes:
        return f"{self.rank}.{len(self.maps) - 1}".encode().ljust(HANDLE_BYTES)

    def open(self, handle: bytes) -> int:
        if handle not in self.opened:
            self.opened[handle] = self._map(self.folder / handle.decode().strip())
        return self.opened[handle]

    def _map(self, file: Path) -> int:
        with file.open("r+b") as opened:
            self.maps.append(mmap.mmap(opened.fileno(), 0))
        return torch.frombuffer(self.maps[-1], dtype=torch.uint8).data_ptr()

    def tensor(self, lease: Lease) -> Tensor:
        return on_card(self, memory(lease.address, lease.nbytes, torch.uint8, lease))

    def copy(self, target: int, source: int, nbytes: int) -> None:
        self.events.append("copy")
        self.queue.append(lambda: ctypes.memmove(target, source, nbytes))

    def sum_publish(
        self,
        sources: Sequence[int],
        targets: Sequence[int],
        length: int,
        dtype: torch.dtype,
        divide: float = 1.0,
    ) -> None:
        self.events.append("sum")
        nbytes = length * dtype.itemsize
        rows = [[memory(one, nbytes, dtype) for one in all_] for all_ in (sources, targets)]
        self.queue.append(lambda: reference.sum_publish(*rows, divide))

    def wait(self) -> None:
        self.events.append("wait")
        while self.queue:
            self.queue.pop(0)()

    def wait_for_all(self) -> None:
        self.events.append("wait for all")
        self.wait()

    def busy(self, seconds: float) -> None:
        self.queue.append(lambda: time.sleep(seconds))


def memory(address: int, nbytes: int, dtype: torch.dtype, lease: object = None) -> Tensor:
    buffer = (ctypes.c_uint8 * nbytes).from_address(address)
    buffer.lease = lease  # type: ignore[attr-defined]
    return torch.frombuffer(buffer, dtype=dtype)


class OnCard(Tensor):
    """A tensor whose copies and fills happen when the card comes to them."""

    card: PretendedCard
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    device = property(lambda self: GPU)  # type: ignore[assignment]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        card = next(one.card for one in args if isinstance(one, OnCard))
        with torch._C.DisableTorchFunctionSubclass():
            plain = [one.as_subclass(Tensor) if isinstance(one, OnCard) else one for one in args]
            if func in (Tensor.copy_, Tensor.fill_):
                card.queue.append(lambda: func(*plain))
                return args[0]
            if func is Tensor.cpu:
                card.wait()
                return plain[0].clone()
            found = func(*plain, **(kwargs or {}))
        return on_card(card, found) if isinstance(found, Tensor) else found


def on_card(card: PretendedCard, x: Tensor) -> Tensor:
    found = x.as_subclass(OnCard)
    found.card = card
    return found


def look(x: Tensor) -> Tensor:
    """What another stream would read now."""
    with torch._C.DisableTorchFunctionSubclass():
        return x.as_subclass(Tensor).clone()


@pytest.fixture
def card(world: World, monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendedCard]:
    monkeypatch.setattr(device_memory, "BLOCK_BYTES", BLOCK_BYTES)
    monkeypatch.setattr(device_memory, "_PAGE_BYTES", BLOCK_BYTES // 2)
    monkeypatch.setattr(device_pieces, "SLOT_BYTES", SLOT_BYTES)
    folder = world.gather_texts(tempfile.mkdtemp() if world.rank == 0 else "")[0]
    yield PretendedCard(Path(folder), world.rank)
    world.gather_texts("nobody opens anything any more")
    if world.rank == 0:
        shutil.rmtree(folder)


@pytest.fixture
def on_gpu(world: World) -> World:
    return dataclasses.replace(world, device=GPU)


def opened(world: World, card: PretendedCard) -> tuple[DeviceWindows | None, str]:
    ranks = tuple(range(world.size))
    return open_windows(world, world.comm, ranks, "all", Pool(card))


@pytest.fixture
def windows(on_gpu: World, card: PretendedCard) -> DeviceWindows:
    found, why = opened(on_gpu, card)
    assert found is not None, why
    card.events.clear()
    return found


def values(length: int, rank: int, dtype: torch.dtype) -> Tensor:
    """Of all sizes and signs, so that the order of a sum shows in its last bits."""
    generator = torch.Generator().manual_seed(1000 * rank + length)
    return torch.randn(length, generator=generator).mul(2.0 ** (rank % 3)).to(dtype)


def put(windows: DeviceWindows, x: Tensor, home: str) -> Tensor:
    """The tensor on the card, in the window or out of it, produced late."""
    card = windows.card
    assert isinstance(card, PretendedCard)
    inside = home == "window" or (home == "mixed" and windows.comm.rank == 0)
    found = windows.empty(x.shape, x.dtype) if inside else None
    if found is None:
        found = on_card(card, torch.empty_like(x))
    card.busy(0.001 * (windows.comm.rank + 1))
    return found.copy_(x)


def spec_of(
    windows: DeviceWindows, collective: str, dtype: torch.dtype, length: int, **facts: int
) -> Spec:
    bounds = (0, *(stop for _, stop in partition(length, windows.comm.size)))
    return Spec(collective, "window", dtype, bounds, "sum", tuple(facts.items()))


def everyone(windows: DeviceWindows, length: int, dtype: torch.dtype) -> list[Tensor]:
    return [values(length, rank, dtype) for rank in range(windows.comm.size)]


def total(all_: list[Tensor], divide: float = 1.0) -> Tensor:
    found = torch.empty_like(all_[0])
    reference.sum_publish(all_, [found], divide)
    return found


def same(found: Tensor, wanted: Tensor) -> bool:
    return torch.equal(found.view(torch.uint8), wanted.view(torch.uint8))


@pytest.mark.parametrize("home", HOMES)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_allreduce(windows: DeviceWindows, dtype: torch.dtype, length: int, home: str) -> None:
    all_ = everyone(windows, length, dtype)
    spec = spec_of(windows, "allreduce", dtype, length)
    x = put(windows, all_[windows.comm.rank], home)
    other = put(windows, torch.zeros_like(all_[0]), "window")
    windows.carry_out(spec, SUM, x, 0, other, 0)
    untouched = look(x)
    windows.carry_out(spec, AVG, x, 0, x, 0)
    assert same(look(other), total(all_))
    assert same(untouched, all_[windows.comm.rank])
    assert same(look(x), total(all_, windows.comm.size))


@pytest.mark.parametrize("home", HOMES)
@pytest.mark.parametrize("length", LENGTHS)
def test_reduce_scatter(windows: DeviceWindows, length: int, home: str) -> None:
    all_ = everyone(windows, length, torch.bfloat16)
    spec = spec_of(windows, "reduce_scatter", torch.float32, length)
    start, stop = partition(length, windows.comm.size)[windows.comm.rank]
    piece = put(windows, torch.zeros(stop - start, dtype=torch.bfloat16), "ordinary")
    x = put(windows, all_[windows.comm.rank], home)
    windows.carry_out(spec, SUM, x, 0, piece, start)
    assert same(look(piece), total(all_)[start:stop])
    assert same(look(x), all_[windows.comm.rank])


@pytest.mark.parametrize("home", HOMES)
@pytest.mark.parametrize("length", LENGTHS)
def test_copies(windows: DeviceWindows, length: int, home: str) -> None:
    rank, size = windows.comm.rank, windows.comm.size
    all_ = everyone(windows, length, torch.float64)
    bounds = tuple(length * one for one in range(size + 1))
    gathered = put(windows, torch.zeros(length * size, dtype=torch.float64), "ordinary")
    x = put(windows, all_[rank], home)
    spec = Spec("allgather", "window", torch.float64, bounds)
    windows.carry_out(spec, NONE, x, bounds[rank], gathered, 0)
    sent = []
    for root in range(size):
        result = put(windows, torch.zeros(length, dtype=torch.float64), "ordinary")
        spec = spec_of(windows, "broadcast", torch.float64, length, root=root)
        windows.carry_out(spec, NONE, x, 0, result, 0)
        sent.append(look(result))
    assert same(look(gathered), torch.cat(all_))
    assert all(same(one, wanted) for one, wanted in zip(sent, all_, strict=True))


@pytest.mark.parametrize("collective", ("allreduce", "reduce_scatter", "allgather", "broadcast"))
@pytest.mark.parametrize("started", (False, True))
def test_prepared(
    windows: DeviceWindows, monkeypatch: pytest.MonkeyPatch, collective: str, started: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: _Stream(windows.card))
    monkeypatch.setattr(torch.cuda, "Event", lambda blocking: _Event())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: _Stream(windows.card))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    rank, size, length = windows.comm.rank, windows.comm.size, 3000
    progress = Progress(windows.world.until, windows.world.overlap)
    windows.drive_by(progress, windows.comm.Dup())
    facts = {"root": 1} if collective == "broadcast" else {}
    spec = spec_of(windows, collective, torch.float32, length, **facts)
    x = put(windows, torch.zeros(length), "window")
    prepared = windows.prepare(spec, SUM, x, places_of(spec, rank))
    found = []
    for step in range(3):
        all_ = [values(length, one + step, torch.float32) for one in range(size)]
        x.copy_(all_[rank])
        if started:
            prepared.start().wait()
        else:
            prepared.run()
        found.append((look(prepared.output), all_))
    progress.stop()
    assert windows.behind is not None
    windows.behind.comm.Free()
    cuts = partition(length, size)
    for output, all_ in found:
        if collective == "allgather":
            wanted = torch.cat([one[low:high] for one, (low, high) in zip(all_, cuts, strict=True)])
        elif collective == "broadcast":
            wanted = all_[1]
        else:
            low, high = cuts[rank] if collective == "reduce_scatter" else (0, length)
            wanted = total(all_)[low:high]
        assert same(output, wanted)


class _Stream:
    """The stream of the thread that made the tensor: a started call finds it by its event."""

    def __init__(self, card: Any) -> None:
        self.card = card

    def record_event(self, event: _Event) -> None:
        event.queue, event.made = self.card.queue, list(self.card.queue)
        self.card.queue.clear()

    def __enter__(self) -> None: ...

    def __exit__(self, *unused: object) -> None: ...


class _Event:
    made: list[Callable[[], object]]
    queue: list[Callable[[], object]]

    def synchronize(self) -> None:
        for one in self.made:
            one()


# --- the order of things, and what comes of taking a step out -------------------------------------


def one_sum(windows: DeviceWindows, slow: int) -> bool:
    """Whether a sum is right where the card of rank ``slow`` is behind all others."""
    card, rank, size = windows.card, windows.comm.rank, windows.comm.size
    assert isinstance(card, PretendedCard)
    length = 64 * size
    spec = spec_of(windows, "allreduce", torch.float32, length)
    x = windows.empty((length,), torch.float32)
    assert x is not None
    x.fill_(-1)
    card.wait()
    windows.world.gather_texts("all have begun")
    if rank == slow:
        card.busy(0.05)
    x.fill_(rank + 1)
    publish = card.sum_publish

    def late(*arguments: Any) -> None:
        card.busy(0.05 if rank == slow else 0)
        publish(*arguments)

    card.sum_publish = late  # type: ignore[method-assign]
    windows.carry_out(spec, SUM, x, 0, x, 0)
    found = look(x)
    card.sum_publish = publish  # type: ignore[method-assign]
    card.wait()
    windows.world.gather_texts("all have ended")
    return bool((found == size * (size + 1) / 2).all())


def nothing(*unused: object) -> None: ...


@pytest.mark.parametrize("left_out", (None, "fence", "settle", "barrier"))
def test_every_step_is_needed(
    windows: DeviceWindows, monkeypatch: pytest.MonkeyPatch, left_out: str | None
) -> None:
    if left_out is not None:
        monkeypatch.setattr(windows, left_out, nothing)
    good = [one_sum(windows, slow) for slow in range(windows.comm.size)]
    said = windows.world.gather_texts(str(all(good)))
    assert ("False" in said) == (left_out is not None)


def test_the_order(windows: DeviceWindows, monkeypatch: pytest.MonkeyPatch) -> None:
    card = windows.card
    assert isinstance(card, PretendedCard)
    for name in ("fence", "arrive", "settle", "barrier"):
        step = getattr(windows, name)

        def noted(*arguments: Any, name: str = name, step: Any = step) -> Any:
            card.events.append(name)
            return step(*arguments)

        monkeypatch.setattr(windows, name, noted)
    x = put(windows, torch.ones(300), "window")
    card.events.clear()
    windows.carry_out(spec_of(windows, "allreduce", torch.float32, 300), SUM, x, 0, x, 0)
    in_order = "fence wait arrive sum settle wait barrier"
    assert " ".join(card.events) == in_order


def test_ranks_that_differ_all_hear_it(windows: DeviceWindows) -> None:
    rank = windows.comm.rank
    wanted = spec_of(windows, "allreduce", torch.float32, 100)
    other = spec_of(windows, "allreduce", torch.float32, 101)
    x = put(windows, torch.ones(100 if rank else 101), "window")
    with pytest.raises(TensorError, match="disagree on what to do: rank 0: allreduce") as one:
        windows.carry_out(wanted if rank else other, SUM, x, 0, x, 0)
    dtype = torch.float16 if rank else torch.bfloat16
    x = put(windows, torch.ones(100, dtype=dtype), "window")
    with pytest.raises(TensorError, match="out of torch.bfloat16; rank 1") as two:
        windows.carry_out(wanted, SUM, x, 0, x, 0)
    said = windows.world.gather_texts(f"{one.value}{two.value}")
    assert len(set(said)) == 1


# --- opening, memory, choice ----------------------------------------------------------------------


@pytest.mark.parametrize("failing", ("allocate", "export", "sum_publish", "open", "garbage"))
def test_one_rank_that_cannot_is_enough(
    on_gpu: World, card: PretendedCard, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    def refuse(*unused: object) -> int:
        raise CardError("planted")

    if on_gpu.rank == 1:
        if failing == "garbage":
            monkeypatch.setattr(card, "open", lambda handle: card.allocate(BLOCK_BYTES))
        else:
            monkeypatch.setattr(card, failing, refuse)
    found, why = opened(on_gpu, card)
    said = on_gpu.gather_texts(why)
    assert found is None
    assert len(set(said)) == 1
    wanted = {
        "allocate": "no room on cuda:0",
        "export": "no room on cuda:0",
        "sum_publish": "planted",
        "open": "memory of rank 0 cannot be opened: planted",
        "garbage": "a trial sum in windows was wrong",
    }
    assert why == wanted[failing]


def test_why_there_are_none(world: World, on_gpu: World, card: PretendedCard) -> None:
    cpu = opened(world, card)
    elsewhere = dataclasses.replace(on_gpu, host=f"host {world.rank}")
    hosts = opened(elsewhere, card)
    assert cpu == (None, "no GPU")
    assert hosts == (None, "the ranks are on several hosts")


def test_memory_is_used_again_when_the_card_is_idle(windows: DeviceWindows) -> None:
    card = windows.card
    assert isinstance(card, PretendedCard)
    x = windows.empty((1000,), torch.float32)
    assert x is not None
    address = x.data_ptr()
    y = windows.empty((1000,), torch.float32)
    row = x.view(10, 100)[3]
    del x
    held = windows.empty((1000,), torch.float32)
    idle_before = card.events.count("wait for all")
    del row
    again = windows.empty((1000,), torch.float32)
    assert y is not None and held is not None and again is not None
    assert address not in (y.data_ptr(), held.data_ptr())
    assert again.data_ptr() == address
    assert idle_before == 0
    assert card.events.count("wait for all") == 1
    assert windows.empty((0, 5), torch.float32) is None


def test_new_blocks_are_opened_when_they_are_met(windows: DeviceWindows) -> None:
    rank, length = windows.comm.rank, BLOCK_BYTES // 2
    blocks = [windows.empty((length,), torch.float32) for _ in range(rank)]
    x = put(windows, values(length, rank, torch.float32), "window" if rank else "ordinary")
    spec = spec_of(windows, "allreduce", torch.float32, length)
    windows.carry_out(spec, SUM, x, 0, x, 0)
    assert same(look(x), total(everyone(windows, length, torch.float32)))
    assert len(windows.pool.blocks) == 1 + len(blocks) + (rank > 0)


def test_what_windows_take(windows: DeviceWindows) -> None:
    x, spec = torch.zeros(1), spec_of(windows, "allreduce", torch.float32, 1)
    assert windows.takes(spec, x) and windows.takes(spec, x.bfloat16())
    assert not windows.takes(spec, x.double())
    assert not windows.takes(dataclasses.replace(spec, op="max"), x)
    assert windows.takes(dataclasses.replace(spec, collective="allgather"), x.bool())
    assert not windows.takes(dataclasses.replace(spec, collective="alltoall"), x)


@pytest.fixture
def aware(on_gpu: World, monkeypatch: pytest.MonkeyPatch) -> World:
    """Messages go straight or staged here; windows cannot be opened."""
    real = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda length, device: real(length))
    return dataclasses.replace(on_gpu, cuda_aware=True)


def ways_of(
    world: World, by_messages: Callable[[str, Tensor], None] = lambda way, x: None
) -> DeviceWays:
    ranks, progress = tuple(range(world.size)), Progress(world.until, False)
    return DeviceWays(world, world.comm, world.comm, ranks, "all", progress, by_messages)


def test_the_slowest_rank_decides(aware: World) -> None:
    calls: list[str] = []

    def by_messages(way: str, x: Tensor) -> None:
        calls.append(way)
        # Straight is faster, but not for everybody.
        time.sleep(0.01 if way == "staged" else 0.03 * (aware.rank == 1))

    ways = ways_of(aware, by_messages)
    first = ways.choose(100_000)
    measured = len(calls)
    again = ways.choose(65_536), ways.choose_messages(130_000)
    only = ways_of(dataclasses.replace(aware, cuda_aware=False), by_messages).choose(1)
    assert ways.windows is None
    assert (first, *again, only) == ("staged",) * 4
    assert len(calls) == measured
    assert set(calls) == {"straight", "staged"}
    assert [size_class(one) for one in (0, 5000, 1 << 20)] == [4096, 4096, 1 << 20]
    assert size_class(1 << 40) == 64 << 20


def test_without_a_gpu_nothing_is_measured(world: World) -> None:
    def refuse(way: str, x: Tensor) -> None:
        raise AssertionError("measured")

    assert ways_of(dataclasses.replace(world, cuda_aware=True), refuse).choose(1) == "straight"
    assert ways_of(world, refuse).choose(1) == "staged"


def test_sizes_that_differ_are_no_hang(aware: World) -> None:
    ways = ways_of(aware)
    with pytest.raises(TensorError, match="disagree on what to do, about 4096 B by straight") as no:
        ways.choose(4096 << aware.rank)
    said = aware.gather_texts(str(no.value))
    assert len(set(said)) == 1


def test_a_way_that_is_named(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    aware = dataclasses.replace(world, cuda_aware=True)
    monkeypatch.setenv("MPMP_GPU_WAY", "straight")
    named = ways_of(aware)
    assert (named.choose(1), named.choose_messages(1), named.windows) == ("straight",) * 2 + (None,)
    with pytest.raises(ConfigError, match="straight cannot be: no GPU"):
        ways_of(world)
    monkeypatch.setenv("MPMP_GPU_WAY", "fast")
    with pytest.raises(ConfigError, match="not 'fast'"):
        ways_of(aware)
    monkeypatch.setenv("MPMP_GPU_WAY", "ipc")
    with pytest.raises(ConfigError, match="ipc cannot be on group all: no GPU"):
        ways_of(aware)


def test_a_group_goes_by_windows(
    on_gpu: World, card: PretendedCard, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, pool = torch.empty, Pool(card)

    def empty(*size: Any, device: Any = None, **options: Any) -> Tensor:
        x = real(*size, **options)
        return on_card(card, x) if device == GPU else x

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(device_path, "pool_of", lambda device: pool)
    monkeypatch.setenv("MPMP_GPU_WAY", "ipc")
    group = Mesh.over(on_gpu).everyone
    all_ = [values(5000, rank, torch.bfloat16) for rank in range(group.size)]
    x = on_card(card, all_[group.rank])
    summed, averaged = group.allreduce(x), group.allreduce(x, op="avg")
    pieces = group.reduce_scatter(x), group.allgather(x), group.broadcast(x, 1)
    inside = group.empty((5000,), torch.bfloat16, GPU)
    inside.copy_(x)
    group.allreduce(inside, out=inside)
    sums = card.events.count("sum")
    start, stop = partition(5000, group.size)[group.rank]
    assert same(look(summed), total(all_)) and same(look(inside), total(all_))
    assert same(look(averaged), total(all_, group.size))
    assert same(look(pieces[0]), total(all_)[start:stop])
    assert same(look(pieces[1]), torch.cat(all_)) and same(look(pieces[2]), all_[1])
    assert sums > 4
