"""One stage of a model's pipeline, of any kind.

    tokens -> embedding -> blocks[0..L) -> head -> losses
              '-- first stage        last stage --'

Shapes: B batch, D model, V vocabulary; t positions of this context rank, u the piece of them that
this rank holds between cut layers: all of them but under sequence parallelism.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mpmp import config
from mpmp.models.blocks import STD, Block
from mpmp.models.ends import Embedding, Head, TagHead
from mpmp.models.lean import Step, lean
from mpmp.models.rope import turns
from mpmp.models.style import Style
from mpmp.models.tokens import own_piece, tokens_of
from mpmp.parallel.maker import Maker
from mpmp.parallel.recompute import recomputed
from mpmp.parallel.stage import Microbatch, Part
from mpmp.parallel.tensor import VocabParallelEmbedding


class TransformerStage(nn.Module):
    """The layers of one pipeline stage; the first also embeds, the last also scores.

    ``way`` is how ranks that share a sequence attend, ``recompute`` what is computed again in
    backward. ``embedding`` is that of the first stage, where this rank holds it, too; ``tags``
    replaces the vocabulary by as many tags of tokens.
    """

    def __init__(
        self,
        make: Maker,
        model: config.Model,
        style: Style,
        vocabulary: int,
        part: Part,
        *,
        way: str,
        recompute: str,
        embedding: Embedding | None,
        tags: int,
    ) -> None:
        super().__init__()
        self.make, self.part, self.dtype = make, part, make.dtype
        self.deferred = make.deferred
        self.width, self.full = model.width, recompute == "full"
        self.head_width = model.width // model.heads if style.positions == "rope" else None
        self.rope_base = model.rope_base
        self._lean: list[Step] = []
        self.embedding: Embedding | None = None
        self.head: Head | TagHead | None = None
        ends = part.shared if model.tied and not tags else ()
        if part.first:
            self.embedding = embedding = Embedding(make, model, style, vocabulary, ends)
        self.blocks = nn.ModuleList()
        for layer in range(*part.layers):
            selective = recompute == "selective"
            block = Block(make, f"blocks.{layer}", model, style, way=way, recompute=selective)
            self.blocks.append(_compiled(block) if make.compiled else block)
        if part.last and tags:
            self.head = TagHead(make, model, style, tags)
        elif part.last:
            table = embedding.table if model.tied and embedding is not None else None
            if table is None:
                name = "embedding" if model.tied else "output"
                table = VocabParallelEmbedding(
                    make, name, vocabulary, model.width, std=STD, stages=ends
                )
            self.head = Head(make, model, style, table)

    def forward(self, x: Tensor, microbatch: Microbatch) -> tuple[Tensor, Tensor | None]:
        """Hidden states (B, u, D), and what the experts add to the objective, summed over B."""
        rotation = None
        if self.head_width is not None:
            dtype = torch.promote_types(self.dtype, torch.float32)
            rotation = turns(microbatch.positions_t, self.head_width, dtype, self.rope_base)
        tokens = tokens_of(microbatch, self.make, rotation)
        if self.embedding is not None:
            x = self.embedding(x, tokens)
        extra: Tensor | None = None
        again = self.full and torch.is_grad_enabled()
        for block in self.blocks if microbatch.cache is None else self.steps:
            x, added = recomputed(block, x, tokens) if again else block(x, tokens)
            if added is not None:
                extra = added if extra is None else extra + added
        return x, extra

    @property
    def steps(self) -> Sequence[Step]:
        """Blocks as generation calls them: not compiled, for numbers of tokens change."""
        return self._lean or [getattr(block, "_orig_mod", block) for block in self.blocks]

    def settle(self) -> None:
        """The weights stay where they are from now on, so that generation can be lean."""
        self._lean = [lean(block) for block in self.blocks]

    def losses(self, hidden: Tensor, microbatch: Microbatch) -> Tensor:
        """Cross entropy of each token in nats, (B, t), 0 where not counted; last stage only."""
        assert self.head is not None, "only the last stage scores"
        return self.head.losses(hidden, microbatch.targets_Bt)

    def logits(self, hidden: Tensor, microbatch: Microbatch) -> Tensor:
        """Logits over the whole vocabulary (or the tags), (B, t, V); last stage only."""
        assert self.head is not None, "only the last stage scores"
        return self.head.logits(hidden, microbatch.count)

    def logits_at(self, hidden: Tensor, microbatch: Microbatch, at: Sequence[int]) -> Tensor:
        """Logits behind one of the t tokens of each sequence, (B, V); last stage only."""
        assert self.head is not None, "only the last stage scores"
        if microbatch.count == 1:
            return self.logits(hidden, microbatch).squeeze(1)
        rows_B = torch.arange(len(at), device=hidden.device)
        at_B = torch.tensor(at, device=hidden.device)
        if self.make.sequence:  # each rank has other tokens
            return self.logits(hidden, microbatch)[rows_B, at_B]
        return self.head.logits(hidden[rows_B, at_B].unsqueeze(1), 1).squeeze(1)

    def hidden_shape(self, microbatch: Microbatch) -> tuple[int, int, int]:
        """(B, u, D) of the hidden states at the stage's borders."""
        start, stop = own_piece(self.make, microbatch.count)
        return microbatch.rows, stop - start, self.width

    def units(self) -> list[nn.Module]:
        """What ZeRO 3 gathers one at a time, in order of forward."""
        return list(self.blocks)


def _compiled(block: nn.Module) -> nn.Module:
    compiled: Any = torch.compile(block)
    return compiled  # type: ignore[no-any-return]
