"""LLaMA in one file of plain torch: the definition that ``llama.py`` is proved against at size 1.

Slow, obvious, no mpmp, no dropout. Parameters carry the names of a merged model.

Shapes: B batch, T time, D model, H heads, G heads of keys and values, K head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def turned(x_BTHK: Tensor, base: float) -> Tensor:
    """Pair (i, i + K/2) of the token at place t turned by the angle t / base ** (2 i / K)."""
    _, T, _, K = x_BTHK.shape
    places_T = torch.arange(T, dtype=torch.float64, device=x_BTHK.device)
    pairs = torch.arange(K // 2, dtype=torch.float64, device=x_BTHK.device)
    angles = places_T[:, None] / base ** (2 * pairs / K)
    cosines = angles.cos().to(x_BTHK.dtype)[:, None]
    sines = angles.sin().to(x_BTHK.dtype)[:, None]
    first, second = x_BTHK[..., : K // 2], x_BTHK[..., K // 2 :]
    return torch.cat((first * cosines - second * sines, second * cosines + first * sines), dim=-1)


class ReferenceBlock(nn.Module):
    """Pre-norm block with causal attention of grouped queries and SwiGLU."""

    def __init__(
        self, width: int, heads: int, kv_heads: int, hidden: int, eps: float, base: float
    ) -> None:
        super().__init__()
        self.base = base
        self.heads, self.kv_heads, self.head = heads, kv_heads, width // heads
        kv_width = kv_heads * self.head
        self.norm1 = nn.RMSNorm(width, eps)
        cut = {"qkv": 3 * width} if kv_heads == heads else {"q": width, "kv": 2 * kv_width}
        cut["out"] = width
        self.attention = nn.ModuleDict(
            {name: nn.Linear(width, out, bias=False) for name, out in cut.items()}
        )
        self.norm2 = nn.RMSNorm(width, eps)
        self.mlp = nn.ModuleDict(
            {
                "up": nn.Linear(width, 2 * hidden, bias=False),  # the gate's, then the values'
                "down": nn.Linear(hidden, width, bias=False),
            }
        )

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_BTD = x_BTD + self.attend(self.norm1(x_BTD))
        gate, up = self.mlp["up"](self.norm2(x_BTD)).chunk(2, dim=-1)
        result: Tensor = x_BTD + self.mlp["down"](gate * torch.sigmoid(gate) * up)
        return result

    def attend(self, x_BTD: Tensor) -> Tensor:
        B, T, D = x_BTD.shape
        if "qkv" in self.attention:
            q, k, v = self.attention["qkv"](x_BTD).chunk(3, dim=-1)
        else:
            q, (k, v) = self.attention["q"](x_BTD), self.attention["kv"](x_BTD).chunk(2, dim=-1)
        q_BHTK = turned(q.view(B, T, self.heads, self.head), self.base).transpose(1, 2)
        k_BGTK = turned(k.view(B, T, self.kv_heads, self.head), self.base).transpose(1, 2)
        v_BGTK = v.view(B, T, self.kv_heads, self.head).transpose(1, 2)
        shared = self.heads // self.kv_heads
        k_BHTK, v_BHTK = (one.repeat_interleave(shared, dim=1) for one in (k_BGTK, v_BGTK))
        scores_BHTT = q_BHTK @ k_BHTK.transpose(2, 3) / self.head**0.5
        past_TT = torch.tril(torch.ones(T, T, dtype=torch.bool, device=x_BTD.device))
        weights_BHTT = scores_BHTT.masked_fill(~past_TT, float("-inf")).softmax(dim=-1)
        mixed_BTD = (weights_BHTT @ v_BHTK).transpose(1, 2).reshape(B, T, D)
        result: Tensor = self.attention["out"](mixed_BTD)
        return result


class ReferenceLLaMA(nn.Module):
    """The whole model; ``forward`` gives logits (B, T, V) for tokens (B, T)."""

    def __init__(
        self,
        layers: int,
        heads: int,
        kv_heads: int,
        width: int,
        hidden: int,
        vocabulary: int,
        tied: bool,
        eps: float = 1e-5,
        base: float = 10_000.0,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(
            ReferenceBlock(width, heads, kv_heads, hidden, eps, base) for _ in range(layers)
        )
        self.norm = nn.RMSNorm(width, eps)
        self.output = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.output.weight = self.embedding.weight

    def forward(self, tokens_BT: Tensor) -> Tensor:
        x_BTD = self.embedding(tokens_BT)
        for block in self.blocks:
            x_BTD = block(x_BTD)
        logits: Tensor = self.output(self.norm(x_BTD))
        return logits

    def load(self, merged: dict[str, Tensor]) -> None:
        """Take the weights of a merged model (keys and values, gate and values come stacked)."""
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                parameter.copy_(merged[name].reshape(parameter.shape))

    def loss(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Mean cross entropy over all tokens, in nats."""
        return nn.functional.cross_entropy(self(tokens_BT).flatten(0, 1), targets_BT.flatten())
