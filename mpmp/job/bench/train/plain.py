"""The same GPT as a user of torch would write it, or one pipeline stage of it.

Fast where torch is: one product for queries, keys and values, and its own attention. Parameters
have the names of a merged model; rows of ``qkv`` are ordered by head, so that a cut by rows (as
DTensor makes it) gives each rank whole heads.

Shapes: B batch, T time, D model, H heads, K head, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mpmp.config import Model


class PlainBlock(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.head = width // heads
        self.norm1 = nn.LayerNorm(width)
        self.attention = nn.ModuleDict(
            {"qkv": nn.Linear(width, 3 * width), "out": nn.Linear(width, width)}
        )
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.ModuleDict(
            {"up": nn.Linear(width, 4 * width), "down": nn.Linear(4 * width, width)}
        )

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_BTD = x_BTD + self.attend(self.norm1(x_BTD))
        hidden = F.gelu(self.mlp["up"](self.norm2(x_BTD)), approximate="tanh")
        result: Tensor = x_BTD + self.mlp["down"](hidden)
        return result

    def attend(self, x_BTD: Tensor) -> Tensor:
        B, T, _ = x_BTD.shape
        qkv_BTH3K = self.attention["qkv"](x_BTD).view(B, T, -1, 3, self.head)
        q_BHTK, k_BHTK, v_BHTK = qkv_BTH3K.permute(3, 0, 2, 1, 4)
        mixed_BHTK = F.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTK, is_causal=True)
        result: Tensor = self.attention["out"](mixed_BHTK.transpose(1, 2).reshape(B, T, -1))
        return result


class PlainGPT(nn.Module):
    """Layers [start, stop) of the model, with the embedding before the first of all its layers and
    the output layer, of weights of its own, behind the last.

    ``forward`` takes tokens (B, T), or hidden states, and gives logits (B, T, V), or hidden states.
    """

    def __init__(self, model: Model, vocabulary: int, layers: tuple[int, int]) -> None:
        super().__init__()
        self.is_first, self.is_last = layers[0] == 0, layers[1] == model.layers
        self.head = model.width // model.heads
        if self.is_first:
            self.embedding = nn.Embedding(vocabulary, model.width)
            self.position = nn.Parameter(torch.empty(model.context, model.width))
        self.blocks = nn.ModuleDict(
            {str(layer): PlainBlock(model.width, model.heads) for layer in range(*layers)}
        )
        if self.is_last:
            self.norm = nn.LayerNorm(model.width)
            self.output = nn.Linear(model.width, vocabulary, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.is_first:
            x = self.embedding(x) + self.position
        for block in self.blocks.values():
            x = block(x)
        return self.output(self.norm(x)) if self.is_last else x

    @torch.no_grad()
    def load(self, merged: Mapping[str, Tensor]) -> None:
        """Take the weights of a merged model, whose queries, keys and values are stacked."""
        for name, parameter in self.named_parameters():
            whole = merged[name]
            if ".qkv." in name:  # (3, H K, ...) to (H 3 K, ...)
                whole = whole.reshape(3, -1, self.head, *whole.shape[2:]).transpose(0, 1)
            parameter.copy_(whole.reshape(parameter.shape))
