"""Attention on sequences that are cut over a context group: what a block of a model calls.

Two ways, and the cut of the sequence that suits each (``programs.sequence.cut_sequence``):

    ring      any number of heads; memory of scores falls with both dims; C - 1 rounds, overlapped
    ulysses   whole sequences of a C-th of the heads; two all-to-alls; not more ranks than heads
              are of use

Shapes: B batch, K head width; t this rank's positions, h query heads, g KV heads.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mpmp.comm.group import Group
from mpmp.parallel.attention import Heads, Rule, attention
from mpmp.parallel.dropout import Dropout
from mpmp.parallel.ring import ring_attention
from mpmp.parallel.ulysses import ulysses_attention
from mpmp.programs.sequence import Cut, cut_sequence
from mpmp.programs.tables import look_up

WAYS: dict[str, Callable[[Tensor, Tensor, Tensor, Group, Heads, Cut, Rule], Tensor]] = {
    "ring": ring_attention,
    "ulysses": ulysses_attention,
}


def context_attention(
    q_BhtK: Tensor,
    k_BgtK: Tensor,
    v_BgtK: Tensor,
    group: Group,
    heads: Heads,
    *,
    length: int,
    causal: bool,
    kind: str = "ring",
    lengths_B: Tensor | None = None,
    dropout: Dropout | None = None,
    samples_B: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Each own head's mixture of values at this rank's positions, (B, h, t, K).

    The positions are those of ``cut_sequence(length, group.size, kind, causal)``; the result is
    that of one process with the whole sequence of ``length``. See ``Rule`` for the others.
    """
    way = look_up(WAYS, kind, "way of context attention")
    rule = Rule(causal, lengths_B, dropout, samples_B, scale)
    if group.size == 1:
        return attention(q_BhtK, k_BgtK, v_BgtK, heads, rule)
    cut = cut_sequence(length, group.size, kind, causal)
    return way(*_as_autocast(q_BhtK, k_BgtK, v_BgtK), group, heads, cut, rule)


def _as_autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As torch's attention would take them under autocast, which leaves float64 as it is."""
    device = q.device.type
    if not torch.is_autocast_enabled(device) or q.dtype is torch.float64:
        return q, k, v
    dtype = torch.get_autocast_dtype(device)
    return q.to(dtype), k.to(dtype), v.to(dtype)
