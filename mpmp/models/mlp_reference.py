"""The two-layer MLP in one file of plain torch: the definition of ``mlp.py``, proved at size 1.

Slow, obvious, no mpmp, no dropout. Parameters carry the names of a merged model.

Shapes: B batch, T time, D model.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ReferenceMLP(nn.Module):
    """The whole model; ``forward`` gives logits (B, T, V) for tokens (B, T)."""

    def __init__(self, layers: int, width: int, hidden: int, vocabulary: int, tied: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "mlp": nn.ModuleDict(
                        {"up": nn.Linear(width, hidden), "down": nn.Linear(hidden, width)}
                    )
                }
            )
            for _ in range(layers)
        )
        self.output = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.output.weight = self.embedding.weight

    def forward(self, tokens_BT: Tensor) -> Tensor:
        x_BTD = self.embedding(tokens_BT)
        for block in self.blocks:
            hidden = nn.functional.gelu(block.get_submodule("mlp.up")(x_BTD))
            x_BTD = x_BTD + block.get_submodule("mlp.down")(hidden)
        logits: Tensor = self.output(x_BTD)
        return logits

    def load(self, merged: dict[str, Tensor]) -> None:
        """Take the weights of a merged model."""
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                parameter.copy_(merged[name].reshape(parameter.shape))

    def loss(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Mean cross entropy over all tokens, in nats."""
        return nn.functional.cross_entropy(self(tokens_BT).flatten(0, 1), targets_BT.flatten())
