"""The door for GPU tensors, tried without a GPU.

``Pretended`` tensors say that they live on a GPU. What a GPU does later is done later here, too: a
copy between such a tensor and host memory waits in a queue until the stream is waited for, so that
whoever reads the target too early finds nonsense there, and the test sees it.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from mpi4py import MPI
from torch import Tensor

from mpmp.comm import probe
from mpmp.comm.buffer import admit, load
from mpmp.comm.carrier import SLOT_BYTES
from mpmp.comm.group import Group
from mpmp.comm.mesh import Mesh
from mpmp.comm.world import World
from mpmp.errors import TensorError

LENGTHS = (3, SLOT_BYTES // 2 + 1)
DTYPES = (torch.float32, torch.bfloat16, torch.int64)
GPU = torch.device("cuda", 1)

pytestmark = pytest.mark.ranks(1, 2, 3)


class PretendedStream:
    """The one stream of the pretended GPU; it stands in for events, too."""

    def __init__(self) -> None:
        self.queue: list[Callable[[], object]] = []
        self.crossings = 0
        self.pinned: list[bool] = []
        self.current = threading.local()

    def current_device(self) -> int:
        """A thread begins with GPU 0; the main thread has chosen another one."""
        main = threading.current_thread() is threading.main_thread()
        return getattr(self.current, "device", GPU.index if main else 0)

    def synchronize(self) -> None:
        while self.queue:
            self.queue.pop(0)()

    def record_event(self, event: object) -> None: ...

    def __enter__(self) -> None:
        self.current.device = GPU.index

    def __exit__(self, *unused: object) -> None:
        del self.current.device


STREAM = PretendedStream()


class Pretended(Tensor):
    """A tensor in host memory that says it is on a GPU."""

    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    device = property(lambda self: GPU)  # type: ignore[assignment]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.copy_:
            target, source = args[:2]
            if isinstance(target, Pretended) != isinstance(source, Pretended):
                assert kwargs.get("non_blocking")
                assert target.dtype == source.dtype, "a conversion on the host"
                with torch._C.DisableTorchFunctionSubclass():
                    there, here = target.as_subclass(Tensor), source.as_subclass(Tensor)
                STREAM.crossings += 1
                STREAM.queue.append(lambda: there.copy_(here))
                return target
        if func in _KERNELS:
            STREAM.synchronize()  # a kernel comes after what was queued before
        return super().__torch_function__(func, types, args, kwargs)


_KERNELS = {Tensor.copy_, Tensor.to, Tensor.fill_, torch.add, torch.maximum, torch.minimum}


def pretend(x: Tensor) -> Tensor:
    return x.clone().as_subclass(Pretended)


def look(x: Tensor) -> Tensor:
    """What a kernel of the consumer would see now."""
    assert isinstance(x, Pretended)
    with torch._C.DisableTorchFunctionSubclass():
        return x.as_subclass(Tensor).clone()


@pytest.fixture(params=["staged", "straight"])
def group(
    request: pytest.FixtureRequest, world: World, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Group]:
    real = torch.empty

    def empty(*size: Any, device: Any = None, pin_memory: bool = False, **options: Any) -> Tensor:
        STREAM.pinned.append(pin_memory)
        x = real(*size, **options).fill_(77)
        return pretend(x) if device == GPU else x

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: STREAM)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: STREAM)
    monkeypatch.setattr(torch.cuda, "Event", lambda blocking: STREAM)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "current_device", STREAM.current_device)
    STREAM.queue.clear()
    STREAM.pinned.clear()
    STREAM.crossings = 0
    straight = request.param == "straight"
    found = Mesh.over(dataclasses.replace(world, cuda_aware=straight)).everyone
    yield found
    STREAM.queue.clear()
    assert (STREAM.crossings == 0) == straight
    assert any(STREAM.pinned) != straight


def mine(group: Group, length: int, dtype: torch.dtype, rank: int | None = None) -> Tensor:
    rank = group.rank if rank is None else rank
    return ((torch.arange(length) + 3 * rank) % 7).to(dtype)


def all_of(group: Group, length: int, dtype: torch.dtype) -> Tensor:
    return torch.stack([mine(group, length, dtype, rank) for rank in range(group.size)])


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_collectives(group: Group, length: int, dtype: torch.dtype) -> None:
    x = pretend(mine(group, length, dtype))
    all_ = all_of(group, length, dtype)
    total = all_.sum(0, dtype=dtype)
    found = look(group.allreduce(x))
    gathered = look(group.allgather(x))
    piece = look(group.reduce_scatter(x))
    sent = [look(group.broadcast(x, root)) for root in range(group.size)]
    in_place = look(group.allreduce(x, out=x))
    start = sum(len(part) for part in total.tensor_split(group.size)[: group.rank])
    assert torch.equal(found, total)
    assert torch.equal(gathered, all_.flatten())
    assert torch.equal(piece, total[start : start + len(piece)])
    assert torch.equal(torch.stack(sent), all_)
    assert torch.equal(in_place, total)


@pytest.mark.parametrize("length", LENGTHS)
def test_messages(group: Group, length: int) -> None:
    right, left = (group.rank + 1) % group.size, (group.rank - 1) % group.size
    out = pretend(torch.zeros(length))
    receive = group.receive(out, left, tag=3)
    send = group.send(pretend(mine(group, length, torch.float32)), right, tag=3)
    receive.wait()
    found = look(out)
    send.wait()
    assert torch.equal(found, mine(group, length, torch.float32, left))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_started_sums(group: Group, dtype: torch.dtype) -> None:
    bucket = pretend(torch.zeros(1000, dtype=dtype))
    sum_ = group.prepare_allreduce(bucket)
    found = []
    for step in range(3):
        bucket.fill_(group.rank + step)
        sum_.start().wait()
        found.append(look(bucket))
    for step in range(3):
        wanted = group.size * (group.size - 1) / 2 + group.size * step
        assert (found[step] == wanted).all()


@pytest.mark.ranks(1)
def test_this_test_sees_a_copy_that_nobody_waited_for(world: World) -> None:
    host, device = torch.zeros(4), pretend(torch.ones(4))
    host.copy_(device, non_blocking=True)
    early = host.clone()
    STREAM.synchronize()
    assert (early == 0).all()
    assert (host == 1).all()


@pytest.mark.ranks(1)
def test_load_leaves_what_is_already_there(world: World) -> None:
    x = torch.ones(4)
    load(x, x)
    with pytest.raises(TensorError, match="on meta cannot be sent"):
        admit(torch.empty(4, device="meta"))


def test_the_probe_sees_wrong_bytes(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(flat: Tensor) -> list[Any]:
        """The last byte of every message goes astray, as a copy that ended early leaves it."""
        return [flat[:-1].numpy(), MPI.BYTE]

    comm = world.comm.Dup()
    good = probe.exchange(comm, torch.device("cpu"))
    monkeypatch.setattr(probe, "as_bytes", damaged)
    bad = probe.exchange(comm, torch.device("cpu"))
    comm.Free()
    assert good
    assert not bad
