"""Ring attention: queries stay, keys and values go round, so no rank ever holds the sequence.

      0 -> 1          C - 1 rounds. While a rank computes on the block of keys and values that it
      ^    |          has, the next one comes from the left: hidden where computing takes longer.
      3 <- 2          Sends 2 (C-1)/C T g K elements forward, and twice that backward.
                      Liu, Zaharia, Abbeel 2023, "Ring attention with blockwise transformers".

Kept for backward are q, k, v, the result and one number a query (its log-sum-exp): a C-th of the
sequence of each. Backward sends keys and values round once more; the gradient of a block follows
one round behind it, gathers a summand on each rank, and comes home last.

Shapes: B batch, t this rank's positions, s another's, K head width; h query heads, g KV heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mpmp.comm.group import Group
from mpmp.comm.transfer import Transfer
from mpmp.parallel.attention import Heads, Rule, places
from mpmp.parallel.attention_block import Mask, block_backward, block_forward, merge_, wide
from mpmp.programs.sequence import Block, Cut, blocks, count

_KEYS_TAG, _GRADIENTS_TAG = 0, 1


def ring_attention(
    q_BhtK: Tensor,
    k_BgtK: Tensor,
    v_BgtK: Tensor,
    group: Group,
    heads: Heads,
    cut: Cut,
    rule: Rule,
) -> Tensor:
    """Each own head's mixture of values at this rank's positions, (B, h, t, K).

    All tensors hold the positions ``cut[group.rank]`` and are of one dtype; all ranks of the group
    must call it, also those without positions.
    """
    ring = _Ring(group, heads, cut, rule, rule.factor(q_BhtK), q_BhtK.device)
    out: Tensor = _RingAttention.apply(q_BhtK, k_BgtK, v_BgtK, ring)  # type: ignore[no-untyped-call]
    return out


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, ring: _Ring) -> Tensor:
        with torch.autocast(q.device.type, enabled=False):
            out, lse = ring.forward(q, k, v)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.ring = ring
        return out

    @staticmethod
    @once_differentiable  # a second derivative would have to go round, too
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, out, lse = ctx.saved_tensors
        with torch.autocast(q.device.type, enabled=False):
            q_grad, kv_grad = ctx.ring.backward(grad.contiguous(), q, k, v, out, lse)
        k_grad, v_grad = kv_grad.to(k.dtype)
        return q_grad.to(q.dtype), k_grad, v_grad, None


@dataclass(frozen=True)
class _Ring:
    """What the ranks do together; k and v travel as one tensor (2, B, g, s, K)."""

    group: Group
    heads: Heads
    cut: Cut
    rule: Rule
    scale: float
    device: torch.device

    def forward(self, q: Tensor, own_k: Tensor, own_v: Tensor) -> tuple[Tensor, Tensor]:
        """The result, of q's dtype, and the log-sum-exps."""
        out = torch.zeros(q.shape, dtype=wide(q.dtype), device=q.device)
        lse = torch.full(q.shape[:-1], float("-inf"), dtype=out.dtype, device=q.device)
        for source, kv in self._go_round(own_k, own_v):
            for block in self._blocks(source):
                self._take_in(source, block, q, kv, out, lse)
        return out.to(q.dtype), lse

    def backward(
        self, grad: Tensor, q: Tensor, own_k: Tensor, own_v: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Gradients of q and of k and v, of the wide type."""
        q_grad = torch.zeros(q.shape, dtype=wide(q.dtype), device=q.device)
        home = torch.zeros((2, *own_k.shape), dtype=q_grad.dtype, device=q.device)
        follower = _Follower(self, home)
        for source, kv in self._go_round(own_k, own_v):
            kv_grad = home if source == self.group.rank else torch.zeros_like(kv, dtype=home.dtype)
            for block in self._blocks(source):
                self._add_gradients(source, block, (grad, q, out, lse), kv, q_grad, kv_grad)
            if source != self.group.rank:
                follower.hand_on(source, kv_grad)
        follower.come_home()
        return q_grad, home

    # --- who sends what when ----------------------------------------------------------------------

    @property
    def right(self) -> int:
        return (self.group.rank + 1) % self.group.size

    @property
    def left(self) -> int:
        return (self.group.rank - 1) % self.group.size

    def _go_round(self, own_k: Tensor, own_v: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Every rank with its keys and values, this one first; the next arrive meanwhile."""
        kv = torch.stack((own_k, own_v))
        under_way: list[Transfer] = []
        for step in range(self.group.size):
            source = (self.group.rank - step) % self.group.size
            if step + 1 < self.group.size:
                coming = self.empty_like(kv, (source - 1) % self.group.size)
                under_way.append(self.group.receive(coming, self.left, _KEYS_TAG))
                under_way.append(self.group.send(kv, self.right, _KEYS_TAG))
            yield source, kv
            if under_way:
                kv = coming
            while under_way:  # none is kept, for it would keep its memory
                under_way.pop().wait()

    def empty_like(self, kv: Tensor, source: int) -> Tensor:
        """Room for what belongs to the keys of a rank."""
        shape = (*kv.shape[:3], count(self.cut[source]), kv.shape[4])
        return torch.empty(shape, dtype=kv.dtype, device=kv.device)

    # --- what is computed -------------------------------------------------------------------------

    def _blocks(self, source: int) -> tuple[Block, ...]:
        return blocks(self.cut[self.group.rank], self.cut[source], self.rule.causal)

    def _take_in(
        self, source: int, block: Block, q: Tensor, kv: Tensor, out: Tensor, lse: Tensor
    ) -> None:
        """Merge a block into the result so far."""
        rows = slice(block.start, block.stop)
        mask = self._mask(source, block)
        part = block_forward(q[:, :, rows], *self._keys(kv, block), mask, self.scale)
        merge_(out[:, :, rows], lse[:, :, rows], *part)

    def _add_gradients(
        self,
        source: int,
        block: Block,
        whole: tuple[Tensor, ...],
        kv: Tensor,
        q_grad: Tensor,
        kv_grad: Tensor,
    ) -> None:
        """Add what a block gives; ``whole`` are grad, q, out and lse of all own queries."""
        rows = slice(block.start, block.stop)
        grad, q, out, lse = (one[:, :, rows] for one in whole)
        mask, keys = self._mask(source, block), self._keys(kv, block)
        parts = block_backward(grad, q, *keys, out, lse, mask, self.scale)
        q_grad[:, :, rows] += parts[0]
        for total, part in zip(kv_grad, parts[1:], strict=True):
            self.heads.add_expanded_(total[:, :, : block.keys], part)

    def _keys(self, kv: Tensor, block: Block) -> tuple[Tensor, Tensor]:
        seen = kv[:, :, :, : block.keys]
        return self.heads.expand(seen[0]), self.heads.expand(seen[1])

    def _mask(self, source: int, block: Block) -> Mask:
        rule, dropout = self.rule, self.rule.drops
        pads = rule.lengths_B is not None and not rule.causal
        if not pads and dropout is None:
            return Mask(block.diagonal)
        q_at, k_at = (places(self.cut[one], self.device) for one in (self.group.rank, source))
        q_at, k_at = q_at[block.start : block.stop], k_at[: block.keys]
        mask = Mask(block.diagonal, rule.seen(q_at, k_at) if pads else None)
        if dropout is None or rule.samples_B is None:
            return mask
        T = sum(map(count, self.cut))
        kept_BhTS = dropout.kept(
            rule.samples_B, (self.heads.total, T, T), (self.heads.own, q_at, k_at)
        )
        return replace(mask, kept_BhTS=kept_BhTS, kept_share=1 - dropout.probability)


class _Follower:
    """The gradients of keys and values, one round behind them."""

    def __init__(self, ring: _Ring, home: Tensor) -> None:
        self._ring, self._home = ring, home
        self._coming: tuple[Tensor, Transfer] | None = None
        self._leaving: Transfer | None = None

    def hand_on(self, source: int, part: Tensor) -> None:
        """Add what has come for the keys of ``source`` to this rank's part, and send it on."""
        self._add_to(part)
        group = self._ring.group
        room = self._ring.empty_like(self._home, (source - 1) % group.size)
        self._coming = room, group.receive(room, self._ring.left, _GRADIENTS_TAG)
        self._leaving = group.send(part, self._ring.right, _GRADIENTS_TAG)

    def come_home(self) -> None:
        """Add what the others have for this rank's own keys."""
        self._add_to(self._home)

    def _add_to(self, part: Tensor) -> None:
        if self._coming is not None and self._leaving is not None:
            room, transfer = self._coming
            transfer.wait()
            part += room
            self._leaving.wait()
            self._coming = self._leaving = None  # their memory is free for what comes next
