"""Keys and values of the tokens so far, which a step of generation reads and does not compute.

    slot     0 1 2 3 4 5 6        a slot for each position, the same in all layers
    row 0    a b c d e|f          a row is a sequence; rows may have unequal lengths. The prompts'
    row 1    a b c|d . .          padding stands behind them and is written over.

A step hands over t further tokens of every row. The first one attends to itself as in training;
later ones read the slots, and a mask is there only where rows are unequal or t is more than one.

Shapes: B rows, t further tokens, S slots in use, K head width; h own query heads, g the KV heads
that they read.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from mpmp.parallel.attention import Heads, Rule, attention


class Cache:
    """What the attentions of one rank keep of some sequences, of at most ``room`` tokens each."""

    def __init__(self, rows: int, room: int, device: torch.device) -> None:
        self.lengths = [0] * rows
        """Tokens of each row whose keys and values are here."""
        self.positions: Tensor = torch.empty(0, dtype=torch.int64, device=device)
        """Places of this step's tokens in their sequences: (t), or (B, t) of unequal rows."""
        self._room, self._device = room, device
        self._layers: dict[object, tuple[Tensor, Tensor, bool]] = {}
        self._first = True
        self._slots = slice(0, 0)
        self._rows: Tensor | None = None
        self._seen: Tensor | None = None

    def begin(self, further: Sequence[int]) -> None:
        """A step of so many further tokens of each row begins; the fewer are padded behind."""
        t, device = max(further), self._device
        starts, self._first = self.lengths, not any(self.lengths)
        self.lengths = [start + count for start, count in zip(starts, further, strict=True)]
        self._rows = self._seen = None
        if len(set(starts)) == 1:
            stop = starts[0] + t
            self.positions = torch.arange(starts[0], stop, device=device)
        else:
            stop = max(starts) + t
            starts_B1 = torch.tensor(starts, device=device).unsqueeze(-1)
            self.positions = starts_B1 + torch.arange(t, device=device)
            self._rows = torch.arange(len(starts), device=device).unsqueeze(-1)
        assert stop <= self._room, f"{stop} tokens in a cache of {self._room}"
        self._slots = slice(stop - t if self._rows is None else 0, stop)
        if not self._first and (t > 1 or self._rows is not None):
            slots = torch.arange(stop, device=device)
            seen = slots <= self.positions.unsqueeze(-1)
            self._seen = seen if self._rows is None else seen.unsqueeze(1)

    def attend(
        self, layer: object, q_BhtK: Tensor, k_BgtK: Tensor, v_BgtK: Tensor, heads: Heads
    ) -> Tensor:
        """This step's mixtures of values in one layer, (B, h, t, K); its keys and values stay."""
        if q_BhtK.numel() == 0:
            return q_BhtK
        kept = self._layers.get(layer)
        if kept is None:
            B, g, _, K = k_BgtK.shape
            shape = (B, g, self._room, K)
            # Zeros: a key that is masked counts nothing, but nothing times NaN would.
            kept = k_BgtK.new_zeros(shape), v_BgtK.new_zeros(shape), heads.grouped
            self._layers[layer] = kept
        keys, values, grouped = kept
        if self._rows is None:
            keys[:, :, self._slots], values[:, :, self._slots] = k_BgtK, v_BgtK
        else:
            keys[self._rows, :, self.positions] = k_BgtK.transpose(1, 2)
            values[self._rows, :, self.positions] = v_BgtK.transpose(1, 2)
        if self._first:
            return attention(q_BhtK, k_BgtK, v_BgtK, heads, Rule(causal=True))
        k_BgSK, v_BgSK = keys[:, :, : self._slots.stop], values[:, :, : self._slots.stop]
        if not grouped:
            k_BgSK, v_BgSK = heads.expand(k_BgSK), heads.expand(v_BgSK)
        if q_BhtK.shape[2] > 1:
            return F.scaled_dot_product_attention(
                q_BhtK, k_BgSK, v_BgSK, attn_mask=self._seen, enable_gqa=True
            )
        # The heads that share keys stand where tokens would: each key is read once for all.
        B, h, _, K = q_BhtK.shape
        shared_BgrK = q_BhtK.view(B, k_BgSK.shape[1], -1, K)
        mixed = F.scaled_dot_product_attention(shared_BgrK, k_BgSK, v_BgSK, attn_mask=self._seen)
        return mixed.reshape(B, h, 1, K)

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows alone, in this order."""
        self.lengths = [self.lengths[row] for row in rows]
        own = list(rows)
        for layer, (keys, values, grouped) in self._layers.items():
            self._layers[layer] = keys[own], values[own], grouped
