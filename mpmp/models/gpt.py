"""GPT (Radford et al. 2019), cut over the pipeline into stages and over the tensor axis.

    tokens -> embedding + position -> blocks[0..L) -> norm -> output layer -> logits
              '------ first stage                            last stage ------'

``gpt_reference.py`` is the same model in one file of plain torch, and the definition.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mpmp import config
from mpmp.comm.mesh import Mesh
from mpmp.errors import LayoutError
from mpmp.models.blocks import Block, LayerNorm
from mpmp.parallel.dropout import Dropout
from mpmp.parallel.maker import Maker
from mpmp.parallel.tensor import VocabParallelEmbedding
from mpmp.programs.partition import partition

_STD = 0.02


class GPTStage(nn.Module):
    """The layers of one pipeline stage; the first also embeds, the last also scores.

    ``forward`` takes tokens (B, T) on the first stage and hidden states (B, T, D) on the others,
    and gives hidden states; on the last stage ``token_losses`` and ``logits`` go on from there.
    Raises LayoutError where there are more stages than layers or more tensor ranks than heads.
    """

    def __init__(
        self, model: config.Model, vocabulary: int, mesh: Mesh, dtype: torch.dtype
    ) -> None:
        super().__init__()
        _refuse_empty_ranks(model, vocabulary, mesh)
        make = Maker(mesh, model.seed, dtype)
        self.width, self.context, self.dtype = model.width, model.context, dtype
        stages = mesh.pipeline.size
        self.layers = partition(model.layers, stages)[mesh.pipeline.rank]
        ends = (0, stages - 1) if model.tied and stages > 1 else ()

        def table(name: str, ends: tuple[int, ...] = ()) -> VocabParallelEmbedding:
            return VocabParallelEmbedding(
                make, name, vocabulary, model.width, std=_STD, stages=ends
            )

        self.embedding: VocabParallelEmbedding | None = None
        self.output: VocabParallelEmbedding | None = None
        if mesh.is_first_stage:
            self.embedding = table("embedding", ends)
            self.position = make.parameter("position", (model.context, model.width), std=_STD)
            self.dropout = Dropout(model.dropout, model.seed, "embedding")
        self.blocks = nn.ModuleList(
            Block(
                make,
                f"blocks.{layer}",
                model.width,
                model.heads,
                std=_STD,
                residual_std=_STD / (2 * model.layers) ** 0.5,
                dropout=model.dropout,
            )
            for layer in range(*self.layers)
        )
        if mesh.is_last_stage:
            self.norm = LayerNorm(make, "norm", model.width)
            if not model.tied:
                self.output = table("output")
            elif self.embedding is not None:
                self.output = self.embedding
            else:
                self.output = table("embedding", ends)

    def forward(self, x: Tensor, samples_B: Tensor | None = None) -> Tensor:
        """Hidden states (B, T, D); ``samples_B`` keys the dropout masks, None drops nothing."""
        if self.embedding is not None:
            T = x.shape[1]
            x = self.embedding(x) + self.position[:T]
            x = self.dropout(x, samples_B, (T, self.width), ((0, T), (0, self.width)))
        for block in self.blocks:
            x = block(x, samples_B)
        return x

    def token_losses(self, x_BTD: Tensor, targets_BT: Tensor) -> Tensor:
        """Cross entropy of each token in nats, (B, T); last stage only."""
        assert self.output is not None, "only the last stage scores"
        return self.output.token_losses(self.norm(x_BTD), targets_BT)

    def logits(self, x_BTD: Tensor) -> Tensor:
        """Logits over the whole vocabulary, (B, T, V); last stage only."""
        assert self.output is not None, "only the last stage scores"
        return self.output.all_logits(self.norm(x_BTD))


def _refuse_empty_ranks(model: config.Model, vocabulary: int, mesh: Mesh) -> None:
    if mesh.pipeline.size > model.layers:
        raise LayoutError(
            f"layout {mesh.layout} has more stages ({mesh.pipeline.size}) than the model has "
            f"layers ({model.layers}); use at most {model.layers} stages"
        )
    most = min(model.heads, vocabulary)
    if mesh.tensor.size > most:
        raise LayoutError(
            f"layout {mesh.layout} has more tensor ranks ({mesh.tensor.size}) than the model has "
            f"heads ({model.heads}) or tokens ({vocabulary}); use at most {most} tensor ranks"
        )
