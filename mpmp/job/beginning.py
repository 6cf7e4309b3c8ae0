"""What a run begins from: random weights, or those of a Hugging Face folder or a merged model."""

from __future__ import annotations

from collections.abc import Sequence

from mpmp.checkpoint import huggingface
from mpmp.checkpoint.held import Held
from mpmp.comm.mesh import Mesh
from mpmp.config import Config, Model
from mpmp.errors import ConfigError
from mpmp.parallel import zero


def vocabulary_of(model: Model, tokens: int) -> int:
    """Rows of the embedding: those that were set, or one for each token of the tokenizer."""
    if model.vocabulary is None:
        return tokens
    if model.vocabulary < tokens:
        raise ConfigError(
            f"model.vocabulary is {model.vocabulary} and the tokenizer has {tokens} tokens; give "
            "the tokenizer that the model was made with by --data.tokenizer"
        )
    return model.vocabulary


def begin(config: Config, pieces: Sequence[zero.Piece], mesh: Mesh) -> tuple[str, ...]:
    """Fill this rank's weights as model.weights says, all ranks together; sentences to show.

    A run that is resumed has weights of its own.
    """
    path = config.model.weights
    if path is None or config.checkpoint.resume:
        return ()
    wants = [
        Held.of("weight", one.placement, one.parameter.detach(), one.start, one.stop)
        for one in pieces
    ]
    notes = huggingface.load_folder(path, wants, mesh, config.model)
    return (f"begins with the weights of {path}", *notes)
