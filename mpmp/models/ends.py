"""The two ends of a model: tokens become hidden states, hidden states become losses.

Shapes: B batch, D model, V vocabulary; t positions of this context rank, u the piece of them that
this rank holds between cut layers.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from mpmp import config
from mpmp.models.blocks import STD
from mpmp.models.norms import LayerNorm, make_norm
from mpmp.models.style import Style
from mpmp.models.tokens import Tokens
from mpmp.parallel.dropout import Dropout
from mpmp.parallel.maker import Maker
from mpmp.parallel.tensor import ReplicatedLinear, VocabParallelEmbedding


class Embedding(nn.Module):
    """Tokens (B, t) -> hidden states (B, u, D): a row of the table, and where learnt a position.

    BERT adds a vector for the token's type, which is the first of all here: text in one piece.
    """

    def __init__(
        self,
        make: Maker,
        model: config.Model,
        style: Style,
        vocabulary: int,
        shared: tuple[int, ...],
    ) -> None:
        super().__init__()
        self.table = VocabParallelEmbedding(
            make, "embedding", vocabulary, model.width, std=STD, stages=shared
        )
        self.position: nn.Parameter | None = None
        if style.positions == "learnt":
            shape = (model.context, model.width)
            self.position = make.parameter("position", shape, std=STD, apart=make.sequence)
        self.token_types: nn.Parameter | None = None
        if style.token_types:
            shape = (model.token_types, model.width)
            self.token_types = make.parameter("token_types", shape, std=STD, apart=make.sequence)
        self.norm = (
            make_norm(make, "embedding_norm", model, style) if style.post_norm else nn.Identity()
        )
        self.dropout = Dropout(model.dropout, make.seed, "embedding")

    def forward(self, tokens_Bt: Tensor, tokens: Tokens) -> Tensor:
        x_BuD = self.table(tokens_Bt)
        if self.position is not None:
            x_BuD = x_BuD + F.embedding(tokens.positions_u, self.position)
        if self.token_types is not None:
            x_BuD = x_BuD + self.token_types[0]
        return tokens.drop(self.dropout, self.norm(x_BuD))


class Head(nn.Module):
    """Hidden states (B, u, D) -> losses (B, t), or logits (B, t, V).

    ``table`` is the embedding's where weights are tied. BERT's head has a layer with GELU and norm
    of its own in front, and a bias behind (Devlin et al. 2019).
    """

    def __init__(
        self, make: Maker, model: config.Model, style: Style, table: VocabParallelEmbedding
    ) -> None:
        super().__init__()
        self.table = table
        width = model.width
        self.norm = (
            nn.Identity() if style.post_norm else make_norm(make, "norm", model, style, True)
        )
        self.transform: nn.Module | None = None
        self.bias: nn.Parameter | None = None
        if style.transform:
            self.transform = nn.Sequential(
                ReplicatedLinear(make, "head.transform", width, width, std=STD),
                nn.GELU(),
                LayerNorm(make, "head.norm", width, model.norm_eps),
            )
            self.bias = make.parameter("head.bias", (table.vocabulary,), cut_dim=0)

    def losses(self, x_BuD: Tensor, targets_Bt: Tensor) -> Tensor:
        return self.table.losses(self._scored(x_BuD), targets_Bt, self.bias)

    def logits(self, x_BuD: Tensor, length: int) -> Tensor:
        return self.table.all_logits(self._scored(x_BuD), length, self.bias)

    def _scored(self, x_BuD: Tensor) -> Tensor:
        x_BuD = self.norm(x_BuD)
        return x_BuD if self.transform is None else self.transform(x_BuD)


class TagHead(nn.Module):
    """Hidden states (B, u, D) -> losses (B, t), or scores of each tag: token classification."""

    def __init__(self, make: Maker, model: config.Model, style: Style, tags: int) -> None:
        super().__init__()
        width = model.width
        self.norm = nn.Identity() if style.post_norm else make_norm(make, "norm", model, style)
        self.table = VocabParallelEmbedding(make, "tags", tags, width, std=STD)
        self.bias = make.parameter("tags.bias", (tags,), cut_dim=0)

    def losses(self, x_BuD: Tensor, targets_Bt: Tensor) -> Tensor:
        return self.table.losses(self.norm(x_BuD), targets_Bt, self.bias)

    def logits(self, x_BuD: Tensor, length: int) -> Tensor:
        return self.table.all_logits(self.norm(x_BuD), length, self.bias)
