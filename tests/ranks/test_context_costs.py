"""What attention on a cut sequence costs: what is sent and when, what is kept, what is alive."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import mpmp
from mpmp.parallel import ring
from mpmp.parallel.attention import Heads
from mpmp.parallel.context import context_attention

B, K = 2, 5


@pytest.fixture(scope="module")
def group(world):
    return mpmp.mesh(context=world.size).context


def pieces(h, g, t):
    """q, k, v and the gradient of the result at a rank's own t positions."""
    return [torch.randn(B, n, t, K, dtype=torch.float64) for n in (h, g, g, h)]


@pytest.mark.ranks(2, 3, 4)
def test_ring_sends_what_its_paper_says(group, monkeypatch):
    """2 (C-1)/C T g K elements forward, and twice that backward, in all of a batch of B."""
    sent = []
    send = group.send
    monkeypatch.setattr(group, "send", lambda x, *to: sent.append(x.numel()) or send(x, *to))
    C, T, g = group.size, 24, 2
    q, k, v, grad = (one.requires_grad_() for one in pieces(4, g, T // C))
    heads = Heads.of(4, g, (0, 4))
    out = context_attention(q, k, v, group, heads, length=T, causal=True)
    assert sum(sent) == 2 * (C - 1) * T // C * g * K * B
    sent.clear()
    out.backward(grad.detach())
    assert sum(sent) == 4 * (C - 1) * T // C * g * K * B


@pytest.mark.ranks(2, 3, 4)
def test_the_next_keys_are_on_their_way_before_a_block_is_computed(group, monkeypatch):
    events = []

    def noted(name, function):
        return lambda *arguments: events.append(name) or function(*arguments)

    for name in ("send", "receive"):
        monkeypatch.setattr(group, name, noted(name, getattr(group, name)))
    monkeypatch.setattr(ring, "block_forward", noted("block", ring.block_forward))
    T = 4 * group.size
    q, k, v, _ = pieces(2, 2, 4)
    context_attention(q, k, v, group, Heads.of(2, 2, (0, 2)), length=T, causal=True)
    assert events == ["receive", "send", "block"] * (group.size - 1) + ["block"]


@pytest.mark.ranks(2, 3, 4)
def test_ulysses_sends_a_part_of_what_a_rank_holds(group, monkeypatch):
    """(C-1)/C of q, k, v and the result."""
    handed = []
    alltoall = group.alltoall

    def counted(x, lengths=None, **known):
        handed.append(x.numel())
        return alltoall(x, lengths, **known)

    monkeypatch.setattr(group, "alltoall", counted)
    C, T, h = group.size, 24, 12
    q, k, v, _ = pieces(h, h, T // C)
    context_attention(q, k, v, group, Heads.of(h, h, (0, h)), length=T, causal=True, kind="ulysses")
    assert handed == [3 * B * h * T // C * K, B * h * T // C * K]


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors that operations make and that are still alive; ``peak`` of them."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self._known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        for one in tree_leaves(results):
            if isinstance(one, torch.Tensor):
                self._count(one.untyped_storage())
        return results

    def leave_out(self, *tensors):
        self._known.update(one.untyped_storage().data_ptr() for one in tensors)

    def _count(self, storage):
        address, nbytes = storage.data_ptr(), storage.nbytes()
        if nbytes and address not in self._known:
            self._known.add(address)
            self.live += nbytes
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._gone, address, nbytes)

    def _gone(self, address, nbytes):
        self._known.discard(address)
        self.live -= nbytes


@pytest.mark.ranks(2, 3, 4)
def test_ring_keeps_and_needs_a_share_of_the_sequence(group):
    """Kept: q, k, v, the result and a number a query; at most a few times as much is ever alive."""
    T, h, g, width = 192, 4, 2, 16
    t = T // group.size
    q, k, v = (torch.randn(B, n, t, width, dtype=torch.float64) for n in (h, g, g))
    whole = B * T * (2 * (h + g) * width + h) * q.itemsize
    kept = []
    with LiveBytes() as memory:
        memory.leave_out(q, k, v)
        for one in (q, k, v):
            one.requires_grad_()
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda x: kept.append(x.numel() * x.itemsize) or x, lambda x: x
        )
        with hooks:
            heads = Heads.of(h, g, (0, h))
            out = context_attention(q, k, v, group, heads, length=T, causal=True)
        forward = memory.peak
        out.sum().backward()
    assert sum(kept) * group.size == whole
    assert forward * group.size <= 2 * whole
    assert memory.peak * group.size <= 4 * whole
