"""Attention of a rank's own heads, in one piece: the definition that cut attention must equal.

Queries and keys have places in the sequence; a query sees a key where neither the mask (causal: no
later key) nor the padding forbids it. Several query heads may share one KV head (Ainslie et al.
2023, "GQA").

Shapes: B batch, T time, K head width; h own query heads, g the KV heads that they read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mpmp.parallel import causal
from mpmp.parallel.dropout import Dropout
from mpmp.programs.sequence import Pieces, positions


@dataclass(frozen=True)
class Heads:
    """A rank's query heads, and the KV head that each of them reads.

    Heads are cut unevenly where they do not divide, and there may be fewer KV heads than ranks, so
    ranks may share a KV head, and a KV head may be read by more heads of one rank than another.
    """

    total: int
    """Query heads of the model."""
    own: tuple[int, int]
    """This rank's query heads (start, stop)."""
    kv: tuple[int, int]
    """The model's KV heads that they read (start, stop): what k and v hold."""
    kv_of_head: tuple[int, ...]
    """For each own query head its place among them, ascending."""

    @classmethod
    def of(cls, total: int, kv_total: int, own: tuple[int, int]) -> Heads:
        """The heads ``own`` of a model whose ``kv_total`` KV heads serve equally many heads."""
        assert total % kv_total == 0, f"{total} heads cannot share {kv_total} KV heads alike"
        read = [head * kv_total // total for head in range(*own)]
        return cls(total, own, *_ranked(read))

    def part(self, start: int, stop: int) -> Heads:
        """The own heads ``[start, stop)``, counted from the first, and what they read."""
        first = self.own[0]
        read = [self.kv[0] + place for place in self.kv_of_head[start:stop]]
        return Heads(self.total, (first + start, first + stop), *_ranked(read))

    @property
    def grouped(self) -> bool:
        """Whether each KV head serves the same number of own heads: the kernels know that."""
        num_kv = self.kv[1] - self.kv[0]
        return self.kv_of_head == tuple(
            head * num_kv // len(self.kv_of_head) for head in range(len(self.kv_of_head))
        ) and (num_kv == 0 or len(self.kv_of_head) % num_kv == 0)

    def expand(self, x_BgTK: Tensor) -> Tensor:
        """Keys or values such that heads are grouped: as they are, or one for each query head."""
        return x_BgTK if self.grouped else x_BgTK[:, list(self.kv_of_head)]

    def add_expanded_(self, x_BgTK: Tensor, part: Tensor) -> None:
        """Adjoint of ``expand``, added to what is there: heads that read the same are summed."""
        if self.grouped:
            x_BgTK += part
        else:
            place = torch.tensor(self.kv_of_head, device=part.device)
            x_BgTK.index_add_(1, place, part.to(x_BgTK.dtype))


def _ranked(read: list[int]) -> tuple[tuple[int, int], tuple[int, ...]]:
    kv = (read[0], read[-1] + 1) if read else (0, 0)
    return kv, tuple(one - kv[0] for one in read)


@dataclass(frozen=True)
class Rule:
    """Which keys a query sees, and which weights are dropped."""

    causal: bool
    """No later key is seen."""
    lengths_B: Tensor | None = None
    """Real tokens of each sequence, at least one; keys behind them are padding and not seen.

    Where causal that needs no mask: only padding would see padding.
    """
    dropout: Dropout | None = None
    samples_B: Tensor | None = None
    """Numbers of the sequences in the whole training, the keys of dropout; None drops nothing."""
    scale: float | None = None
    """Factor of the scores; K^-1/2 unless given."""

    @property
    def drops(self) -> Dropout | None:
        """The dropout to apply, if any."""
        active = self.dropout is not None and self.dropout.probability > 0.0
        return self.dropout if active and self.samples_B is not None else None

    def factor(self, q: Tensor) -> float:
        return float(q.shape[-1] ** -0.5) if self.scale is None else self.scale

    def seen(self, q_at: Tensor, k_at: Tensor) -> Tensor | None:
        """True where the query at a place sees the key at another, (T, T) or (B, 1, 1, T)."""
        if self.causal:
            return k_at <= q_at.unsqueeze(-1)
        if self.lengths_B is not None:
            return (k_at < self.lengths_B.unsqueeze(-1))[:, None, None]
        return None


def attention(
    q_BhTK: Tensor,
    k_BgTK: Tensor,
    v_BgTK: Tensor,
    heads: Heads,
    rule: Rule,
    *,
    q_positions: Tensor | None = None,
    k_positions: Tensor | None = None,
) -> Tensor:
    """Each own head's mixture of values, (B, h, T, K).

    The positions are the places of queries and keys in the sequence, int64 vectors; omitted they
    are 0, 1, ... Dropped weights are elements of (heads, T, T), T the number of keys.
    """
    if q_BhTK.numel() == 0:
        return q_BhTK
    k_BgTK, v_BgTK = heads.expand(k_BgTK), heads.expand(v_BgTK)
    if rule.causal and q_positions is None and k_positions is None and rule.drops is None:
        if causal.takes(q_BhTK, k_BgTK):
            return causal.causal_attention(q_BhTK, k_BgTK, v_BgTK, rule.factor(q_BhTK))
        return _library(q_BhTK, k_BgTK, v_BgTK, rule, is_causal=True)
    q_at, k_at = (
        torch.arange(x.shape[2], device=x.device) if at is None else at
        for x, at in ((q_BhTK, q_positions), (k_BgTK, k_positions))
    )
    seen = rule.seen(q_at, k_at)
    if rule.drops is None:
        return _library(q_BhTK, k_BgTK, v_BgTK, rule, attn_mask=seen)
    # The library's own dropout would depend on the layout.
    scores_BhTT = grouped_product(q_BhTK * rule.factor(q_BhTK), k_BgTK.mT)
    if seen is not None:  # added, for a product would be kept for backward
        scores_BhTT = scores_BhTT + as_bias(seen, scores_BhTT.dtype)
    T = k_BgTK.shape[2]
    weights_BhTT = rule.drops(
        scores_BhTT.softmax(-1), rule.samples_B, (heads.total, T, T), (heads.own, q_at, k_at)
    )
    return grouped_product(weights_BhTT.to(v_BgTK.dtype), v_BgTK)


def _library(q: Tensor, k: Tensor, v: Tensor, rule: Rule, **mask: Any) -> Tensor:
    """torch's attention, of which each device has a fast kernel."""
    grouped = k.shape[1] < q.shape[1]
    return F.scaled_dot_product_attention(q, k, v, scale=rule.scale, enable_gqa=grouped, **mask)


def places(pieces: Pieces, device: torch.device) -> Tensor:
    """The positions of pieces of a sequence, int64."""
    return torch.tensor(positions(pieces), dtype=torch.int64, device=device)


def as_bias(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to scores: 0 where a key is seen, minus infinity where it is not."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(
        ~seen, float("-inf")
    )


def grouped_product(x_BhTS: Tensor, y_BgSK: Tensor) -> Tensor:
    """``x @ y`` for each head, those that share a y after one another; y is not repeated."""
    B, h, T, S = x_BhTS.shape
    g = y_BgSK.shape[1]
    return (x_BhTS.reshape(B, g, h // g * T, S) @ y_BgSK).view(B, h, T, -1)
