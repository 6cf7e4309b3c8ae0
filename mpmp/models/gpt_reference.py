"""GPT in one file of plain torch: the definition that ``gpt.py`` is proved against at size 1.

Slow, obvious, no mpmp, no dropout. Parameters carry the names of a merged model.

Shapes: B batch, T time, D model, H heads, K head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ReferenceBlock(nn.Module):
    """Pre-norm block with causal attention and a GELU feed-forward."""

    def __init__(self, width: int, heads: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, eps)
        self.attention = nn.ModuleDict(
            {"qkv": nn.Linear(width, 3 * width), "out": nn.Linear(width, width)}
        )
        self.norm2 = nn.LayerNorm(width, eps)
        self.mlp = nn.ModuleDict(
            {"up": nn.Linear(width, 4 * width), "down": nn.Linear(4 * width, width)}
        )

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_BTD = x_BTD + self.attend(self.norm1(x_BTD))
        hidden = nn.functional.gelu(self.mlp["up"](self.norm2(x_BTD)), approximate="tanh")
        result: Tensor = x_BTD + self.mlp["down"](hidden)
        return result

    def attend(self, x_BTD: Tensor) -> Tensor:
        B, T, D = x_BTD.shape
        q_BHTK, k_BHTK, v_BHTK = (
            one_BTD.view(B, T, self.heads, -1).transpose(1, 2)
            for one_BTD in self.attention["qkv"](x_BTD).chunk(3, dim=-1)
        )
        scores_BHTT = q_BHTK @ k_BHTK.transpose(2, 3) / (D // self.heads) ** 0.5
        past_TT = torch.tril(torch.ones(T, T, dtype=torch.bool, device=x_BTD.device))
        weights_BHTT = scores_BHTT.masked_fill(~past_TT, float("-inf")).softmax(dim=-1)
        mixed_BTD = (weights_BHTT @ v_BHTK).transpose(1, 2).reshape(B, T, D)
        result: Tensor = self.attention["out"](mixed_BTD)
        return result


class ReferenceGPT(nn.Module):
    """The whole model; ``forward`` gives logits (B, T, V) for tokens (B, T)."""

    def __init__(
        self,
        layers: int,
        heads: int,
        width: int,
        context: int,
        vocabulary: int,
        tied: bool,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(torch.empty(context, width))
        self.blocks = nn.ModuleList(ReferenceBlock(width, heads, eps) for _ in range(layers))
        self.norm = nn.LayerNorm(width, eps)
        self.output = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.output.weight = self.embedding.weight

    def forward(self, tokens_BT: Tensor) -> Tensor:
        x_BTD = self.embedding(tokens_BT) + self.position[: tokens_BT.shape[1]]
        for block in self.blocks:
            x_BTD = block(x_BTD)
        logits: Tensor = self.output(self.norm(x_BTD))
        return logits

    def load(self, merged: dict[str, Tensor]) -> None:
        """Take the weights of a merged model (queries, keys and values come stacked)."""
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                parameter.copy_(merged[name].reshape(parameter.shape))

    def loss(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Mean cross entropy over all tokens, in nats."""
        return nn.functional.cross_entropy(self(tokens_BT).flatten(0, 1), targets_BT.flatten())
