"""Attention whose heads are cut over the tensor axis and whose sequences over the context axis.

Shapes: B batch, T time, D model, K head width; h own query heads, g the KV heads that they read,
t positions of this context rank, u those of them that this rank holds between cut layers.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from mpmp import config
from mpmp.models.rope import turn
from mpmp.models.style import Style
from mpmp.models.tokens import Tokens
from mpmp.parallel.attention import Heads
from mpmp.parallel.context import context_attention
from mpmp.parallel.dropout import Dropout
from mpmp.parallel.maker import Maker
from mpmp.parallel.recompute import recomputed
from mpmp.parallel.tensor import ColumnParallelLinear, RowParallelLinear, columns


class Attention(nn.Module):
    """Every rank has its own query heads; several may read one KV head (Ainslie et al. 2023).

    Queries, keys and values are stacked where there are as many heads of each. Where there are
    fewer KV heads, cuts fall between the query heads of different KV heads if there are enough for
    all ranks; otherwise each rank holds all keys' and values' weights and uses those that its
    heads read. ``way`` says how ranks share a sequence, ``recompute`` that scores are computed
    again in backward.
    """

    def __init__(
        self,
        make: Maker,
        name: str,
        model: config.Model,
        style: Style,
        *,
        stds: tuple[float, float],
        way: str,
        recompute: bool,
    ) -> None:
        super().__init__()
        heads, kv_heads, width = model.heads, model.num_kv_heads, model.width
        self.head, self.group, self.way = width // heads, make.context, way
        self.causal, self.recompute = style.causal, recompute
        lined_up = kv_heads >= make.tensor.size
        unit = heads // kv_heads if lined_up else 1
        self.heads = Heads.of(heads, kv_heads, make.cut(heads, unit))
        self.stacked = kv_heads == heads
        cut = partial(ColumnParallelLinear, make, std=stds[0], bias=style.bias)
        if self.stacked:
            self.qkv = cut(f"{name}.qkv", width, width, blocks=3, unit=self.head)
        else:
            kv_width = kv_heads * self.head
            start, stop = self.heads.kv
            rows = None if lined_up else (start * self.head, stop * self.head)
            self.q = cut(f"{name}.q", width, width, unit=unit * self.head)
            self.kv = cut(f"{name}.kv", width, kv_width, blocks=2, unit=self.head, rows=rows)
        self.out = RowParallelLinear(
            make,
            f"{name}.out",
            width,
            width,
            std=stds[1],
            unit=unit * self.head,
            bias=style.bias,
        )
        self.dropout = Dropout(model.dropout, make.seed, f"{name}.weights")
        self.attend = context_attention if self.group.size == 1 else make.outside(context_attention)

    def forward(self, x_BuD: Tensor, tokens: Tokens) -> Tensor:
        q_BhtK, k_BgtK, v_BgtK = self._projected(x_BuD, tokens)
        if tokens.turns is not None:
            q_BhtK, k_BgtK = turn(q_BhtK, tokens.turns), turn(k_BgtK, tokens.turns)
        if tokens.cache is not None:
            mixed_BhtK = tokens.cache.attend(self, q_BhtK, k_BgtK, v_BgtK, self.heads)
        elif self.recompute:
            mixed_BhtK = recomputed(self._mix, q_BhtK, k_BgtK, v_BgtK, tokens)
        else:
            mixed_BhtK = self._mix(q_BhtK, k_BgtK, v_BgtK, tokens)
        return self.out(mixed_BhtK.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def _projected(self, x_BuD: Tensor, tokens: Tokens) -> tuple[Tensor, ...]:
        """Queries, keys and values; a rank of a short sequence may have none."""
        t = tokens.count
        if self.stacked:
            stacked = torch.unflatten(self.qkv(x_BuD, t), -1, (3, -1, self.head))
            return stacked.permute(2, 0, 3, 1, 4).unbind()
        q, kv = columns(x_BuD, t, self.q, self.kv)
        q_BhtK = torch.unflatten(q, -1, (-1, self.head)).transpose(1, 2)
        kv = torch.unflatten(kv, -1, (2, -1, self.head))
        return q_BhtK, *kv.permute(2, 0, 3, 1, 4).unbind()

    def _mix(self, q_BhtK: Tensor, k_BgtK: Tensor, v_BgtK: Tensor, tokens: Tokens) -> Tensor:
        return self.attend(
            q_BhtK,
            k_BgtK,
            v_BgtK,
            self.group,
            self.heads,
            length=tokens.length,
            causal=self.causal,
            kind=self.way,
            lengths_B=tokens.lengths_B,
            dropout=self.dropout,
            samples_B=tokens.samples_B,
        )
