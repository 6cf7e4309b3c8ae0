"""Floor 3: models from one set of blocks, each beside a one-file plain-torch reference."""

from __future__ import annotations

import torch
from torch import nn

from mpmp import config
from mpmp.comm.mesh import Mesh
from mpmp.models.bert import BERT
from mpmp.models.ends import Embedding
from mpmp.models.gpt import GPT
from mpmp.models.llama import LLAMA
from mpmp.models.mlp import MLP
from mpmp.models.refusals import refuse, refuse_model
from mpmp.models.stage import TransformerStage
from mpmp.models.style import Style
from mpmp.parallel.deferred import Deferred
from mpmp.parallel.maker import Maker
from mpmp.parallel.stage import Part

MODELS: dict[str, Style] = {"gpt": GPT, "llama": LLAMA, "bert": BERT, "mlp": MLP}
"""The kinds: one file each, one line in this table."""


def build(
    model: config.Model,
    vocabulary: int,
    mesh: Mesh,
    dtype: torch.dtype,
    part: Part,
    *,
    sequence: bool = False,
    attention: str = "ring",
    recompute: str = "none",
    compile: bool = False,
    embedding: nn.Module | None = None,
    transient: bool = False,
    tags: int = 0,
    deferred: Deferred | None = None,
) -> TransformerStage:
    """A stage of a model, as the settings of the same names say.

    ``embedding`` is that of the first stage where weights are tied and both ends are on this
    rank, ``transient`` says that ZeRO 3 takes weights away between their uses, and ``tags`` makes a
    classifier of tokens of as many tags. ``deferred`` is that of all stages of this rank. Raises
    LayoutError where a rank would be left without work.
    """
    refuse_model(model, mesh, vocabulary, tags)
    assert embedding is None or isinstance(embedding, Embedding)
    make = Maker(
        mesh,
        model.seed,
        dtype,
        sequence=sequence,
        transient=transient,
        compiled=compile,
        deferred=deferred,
    )
    return TransformerStage(
        make,
        model,
        MODELS[model.kind],
        vocabulary,
        part,
        way=attention,
        recompute=recompute,
        embedding=embedding,
        tags=tags,
    )


__all__ = ["MODELS", "TransformerStage", "build", "refuse", "refuse_model"]
