"""Order between CUDA streams and MPI, which knows none: slow kernels before and after transfers.

Each test first keeps the GPU busy, so that a transfer which did not wait for the kernel that makes
its tensor sends what was in the memory before.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from mpmp.comm.carrier import SLOT_BYTES
from mpmp.comm.group import Group

pytestmark = pytest.mark.ranks(1, 2, 4)

LENGTHS = (16, SLOT_BYTES)
SLEEP_CYCLES = 200_000_000
"""About a tenth of a second on the cards of these years."""


def busy(device: torch.device, cycles: int = SLEEP_CYCLES) -> None:
    if device.type == "cuda":
        torch.cuda._sleep(cycles)


def on(stream: Any) -> AbstractContextManager[object]:
    return torch.cuda.stream(stream) if stream is not None else nullcontext()


def new_stream(device: torch.device) -> Any:
    return torch.cuda.Stream(device) if device.type == "cuda" else None


def late(length: int, value: float, device: torch.device) -> Tensor:
    """A tensor that is -1 now and ``value`` when the current stream comes to it."""
    x = torch.full((length,), -1.0, device=device)
    busy(device)
    return x.fill_(value)


def total(group: Group, offset: float = 0) -> float:
    return sum(rank + 1 + offset for rank in range(group.size))


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("aside", (False, True))
def test_a_collective_between_two_kernels(
    group: Group, device: torch.device, length: int, aside: bool
) -> None:
    with on(new_stream(device) if aside else None):
        x = late(length, group.rank + 1, device)
        found = group.allreduce(x) * 2
        x.fill_(-1)  # the memory may be written as soon as the call is back
        host = found.cpu()
    assert (host == 2 * total(group)).all()


@pytest.mark.parametrize("length", LENGTHS)
def test_two_streams_share_the_staging_slots(
    group: Group, device: torch.device, length: int
) -> None:
    first, second = new_stream(device), new_stream(device)
    with on(first):
        x = late(length, group.rank + 1, device)
        one = group.allreduce(x)
    with on(second):
        y = torch.full((length,), group.rank + 11.0, device=device)
        two = group.allreduce(y)
    host = one.cpu(), two.cpu()
    assert (host[0] == total(group)).all()
    assert (host[1] == total(group, 10)).all()


@pytest.mark.parametrize("length", LENGTHS)
def test_messages_between_two_kernels(group: Group, device: torch.device, length: int) -> None:
    right, left = (group.rank + 1) % group.size, (group.rank - 1) % group.size
    old = torch.full((length,), 7.0, device=device)
    busy(device)
    read_before = old * 2  # still to come when the receive is posted: it must not see the message
    receive = group.receive(old, left, tag=1)
    send = group.send(late(length, group.rank + 1, device), right, tag=1)
    receive.wait()
    read_after = old * 2
    send.wait()
    before, after = read_before.cpu(), read_after.cpu()
    assert (before == 14).all()
    assert (after == 2 * (left + 1)).all()


@pytest.mark.parametrize("length", LENGTHS)
def test_a_started_sum_between_two_kernels(group: Group, device: torch.device, length: int) -> None:
    bucket = torch.zeros(length, device=device)
    sum_ = group.prepare_allreduce(bucket)
    found = []
    for step in range(3):
        busy(device)
        bucket.fill_(group.rank + 1 + step)
        handle = sum_.start()
        busy(device)  # backward goes on
        handle.wait()
        with on(new_stream(device)):  # a consumer on any stream
            found.append((bucket * 2).cpu())
    for step in range(3):
        assert (found[step] == 2 * total(group, step)).all()


def test_a_started_sum_does_not_wait_for_later_kernels(group: Group, device: torch.device) -> None:
    bucket = torch.zeros(1000, device=device)
    sum_ = group.prepare_allreduce(bucket)
    sum_.start().wait()
    bucket.fill_(group.rank + 1)
    handle = sum_.start()
    busy(device, 10 * SLEEP_CYCLES)
    after = torch.cuda.Event() if device.type == "cuda" else None
    if after is not None:
        after.record(torch.cuda.current_stream(device))
    handle.wait()
    overlapped = after is None or not after.query()
    host = bucket.cpu()
    assert (host == total(group)).all()
    # Straight, the copies are MPI's own and may wait for the default stream.
    assert overlapped or group._started.world.cuda_aware


class Summed(torch.autograd.Function):
    """Identity whose gradient is summed over the ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.group.allreduce(gradient.contiguous()), None


@pytest.mark.parametrize("length", LENGTHS)
def test_a_collective_in_backward(group: Group, device: torch.device, length: int) -> None:
    # Autograd runs backward on the GPU in a thread of its own.
    x = torch.zeros(length, device=device, requires_grad=True)
    y = Summed.apply(x, group) * late(length, group.rank + 1, device)
    busy(device)
    y.sum().backward()
    assert x.grad is not None
    host = x.grad.cpu()
    assert (host == total(group)).all()
