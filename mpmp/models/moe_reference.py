"""GPT whose feed-forwards are experts, in plain torch: ``gpt_reference.py`` with other blocks.

Shapes: B batch, T time, D model, V vocabulary.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from mpmp.models.experts_reference import ReferenceExperts
from mpmp.models.gpt_reference import ReferenceBlock, ReferenceGPT


class ReferenceMoEBlock(ReferenceBlock):
    """Pre-norm block with causal attention and experts; gives their auxiliary loss, too."""

    def __init__(self, width: int, heads: int, experts: int, top_k: int, capacity: float) -> None:
        super().__init__(width, heads)
        gelu = partial(nn.functional.gelu, approximate="tanh")
        self.mlp = ReferenceExperts(  # type: ignore[assignment]
            width, 4 * width, experts, top_k, capacity, gelu
        )

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x_BTD = x_BTD + self.attend(self.norm1(x_BTD))
        y_BTD, added = self.mlp(self.norm2(x_BTD))
        return x_BTD + y_BTD, added


class ReferenceMoE(ReferenceGPT):
    """The whole model; ``balance`` weighs the auxiliary loss, a mean over the sequences."""

    def __init__(
        self,
        layers: int,
        heads: int,
        width: int,
        context: int,
        vocabulary: int,
        tied: bool,
        experts: int,
        top_k: int,
        capacity: float,
        balance: float,
    ) -> None:
        super().__init__(layers, heads, width, context, vocabulary, tied)
        self.blocks = nn.ModuleList(
            ReferenceMoEBlock(width, heads, experts, top_k, capacity) for _ in range(layers)
        )
        self.balance = balance
        self.added: list[Tensor] = []

    def forward(self, tokens_BT: Tensor) -> Tensor:
        x_BTD = self.embedding(tokens_BT) + self.position[: tokens_BT.shape[1]]
        self.added = []
        for block in self.blocks:
            x_BTD, added = block(x_BTD)
            self.added.append(added)
        logits: Tensor = self.output(self.norm(x_BTD))
        return logits

    def load(self, merged: dict[str, Tensor]) -> None:
        """Take the weights of a merged model, where those of experts end in ``.weight``."""
        super().load(merged | {name.removesuffix(".weight"): one for name, one in merged.items()})

    def loss(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Mean cross entropy over all tokens, in nats, and the weighted auxiliary loss."""
        entropy = super().loss(tokens_BT, targets_BT)
        return entropy + self.balance * sum(self.added, entropy.new_zeros(())) / len(tokens_BT)
