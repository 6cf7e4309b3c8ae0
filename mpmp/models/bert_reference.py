"""BERT in one file of plain torch: the definition that ``bert.py`` is proved against at size 1.

Slow, obvious, no mpmp, no dropout. Parameters carry the names of a merged model.

Shapes: B batch, T time, D model, H heads, K head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ReferenceBlock(nn.Module):
    """Post-norm block: attention to all tokens that are no padding, and a GELU feed-forward."""

    def __init__(self, width: int, heads: int, eps: float) -> None:
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

    def forward(self, x_BTD: Tensor, lengths_B: Tensor) -> Tensor:
        x_BTD = self.norm1(x_BTD + self.attend(x_BTD, lengths_B))
        hidden = nn.functional.gelu(self.mlp["up"](x_BTD))
        result: Tensor = self.norm2(x_BTD + self.mlp["down"](hidden))
        return result

    def attend(self, x_BTD: Tensor, lengths_B: Tensor) -> Tensor:
        B, T, D = x_BTD.shape
        q_BHTK, k_BHTK, v_BHTK = (
            one_BTD.view(B, T, self.heads, -1).transpose(1, 2)
            for one_BTD in self.attention["qkv"](x_BTD).chunk(3, dim=-1)
        )
        scores_BHTT = q_BHTK @ k_BHTK.transpose(2, 3) / (D // self.heads) ** 0.5
        padding_BT = torch.arange(T, device=x_BTD.device) >= lengths_B[:, None]
        scores_BHTT = scores_BHTT.masked_fill(padding_BT[:, None, None, :], float("-inf"))
        mixed_BTD = (scores_BHTT.softmax(dim=-1) @ v_BHTK).transpose(1, 2).reshape(B, T, D)
        result: Tensor = self.attention["out"](mixed_BTD)
        return result


class ReferenceBERT(nn.Module):
    """The whole model; ``forward`` gives logits (B, T, V) for tokens (B, T).

    ``lengths_B`` are the tokens of each sequence; padding follows them.
    """

    def __init__(
        self,
        layers: int,
        heads: int,
        width: int,
        context: int,
        vocabulary: int,
        tied: bool,
        token_types: int = 2,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(torch.empty(context, width))
        self.token_types = nn.Parameter(torch.empty(token_types, width))
        self.embedding_norm = nn.LayerNorm(width, eps)
        self.blocks = nn.ModuleList(ReferenceBlock(width, heads, eps) for _ in range(layers))
        self.head = nn.ModuleDict(
            {"transform": nn.Linear(width, width), "norm": nn.LayerNorm(width, eps)}
        )
        self.head.register_parameter("bias", nn.Parameter(torch.empty(vocabulary)))
        self.output = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.output.weight = self.embedding.weight

    def forward(self, tokens_BT: Tensor, lengths_B: Tensor) -> Tensor:
        x_BTD = self.embedding(tokens_BT) + self.position[: tokens_BT.shape[1]]
        x_BTD = self.embedding_norm(x_BTD + self.token_types[0])
        for block in self.blocks:
            x_BTD = block(x_BTD, lengths_B)
        x_BTD = self.head["norm"](nn.functional.gelu(self.head["transform"](x_BTD)))
        logits: Tensor = self.output(x_BTD) + self.head.get_parameter("bias")
        return logits

    def load(self, merged: dict[str, Tensor]) -> None:
        """Take the weights of a merged model (queries, keys and values come stacked)."""
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                parameter.copy_(merged[name].reshape(parameter.shape))

    def loss(self, tokens_BT: Tensor, targets_BT: Tensor, lengths_B: Tensor) -> Tensor:
        """Mean cross entropy over the tokens whose target is not -100, in nats."""
        logits_BTV = self(tokens_BT, lengths_B)
        return nn.functional.cross_entropy(
            logits_BTV.flatten(0, 1), targets_BT.flatten(), ignore_index=-100
        )
