"""What a model in files says of itself; of a merged one, the metadata of its safetensors file.

With that the file is enough to go on from: to generate, to fine-tune, to export.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

import mpmp
from mpmp.checkpoint.meta import require_types
from mpmp.config import Model
from mpmp.errors import CheckpointError, ConfigError

ROWS = "rows"
"""In place of a text of the metadata: how many rows the file's embedding has."""
HeadOf = Literal["words", "tags", ""]
"""What a model scores behind its blocks: the vocabulary, tags of tokens, or nothing."""


@dataclass(frozen=True)
class Described:
    """A model that lies in files, as its settings tell of it; ``model.weights`` is where."""

    model: Model
    tags: tuple[str, ...] = ()
    """Names of the classes that tokens are put in, where the model has a classifier."""
    head: HeadOf = "words"
    theirs: bool = False
    """The tensors have Hugging Face's names."""
    tokenizer: str | None = None
    """The tokenizer.json beside the weights."""
    notes: tuple[str, ...] = ()
    """Sentences for the user: what the files say and mpmp leaves out."""


def metadata(step: int, meta: Mapping[str, Any]) -> dict[str, str]:
    """Of the merged model whose checkpoint has ``meta``; safetensors takes texts only."""
    found = {"format": "pt", "mpmp": mpmp.__version__, "step": str(step)}
    if "model" in meta.get("config", {}):
        found["model"] = json.dumps({**meta["config"]["model"], "weights": None})
    if meta.get("tags"):
        found["tags"] = json.dumps(meta["tags"])
    return found


def described(said: Mapping[str, Any], where: str) -> Described | None:
    """The model that :func:`metadata` tells of; None where it tells of none."""
    if "model" not in said:
        return None
    try:
        tags = json.loads(said.get("tags", "[]"))
        model = {**json.loads(said["model"]), "vocabulary": said[ROWS]}
        return described_by({"model": model}, tags, where)
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} has metadata that makes no sense ({error})") from None


def described_by(settings: Mapping[str, Any], tags: Any, where: str) -> Described:
    """The model of saved settings (``to_dict`` of a Config), and of the tags that it gives."""
    try:
        model = dataclasses.replace(_model(dict(settings["model"])), weights=where)
        names = tuple(tags or ())
        if isinstance(tags, str) or not all(isinstance(one, str) for one in names):
            raise TypeError(f"tags {tags!r:.80}")
    except (KeyError, TypeError, ValueError, OverflowError, ConfigError) as error:
        raise CheckpointError(
            f"{where} tells of its model what this mpmp does not understand ({error!s:.200})"
        ) from None
    return Described(model, names, "tags" if names else "words")


def _model(said: Mapping[str, Any]) -> Model:
    """Settings out of a file as a model; ValueError or TypeError where they are none."""
    require_types("model", said, Model)
    for name, hint in get_type_hints(Model).items():
        if get_origin(hint) is Literal and said.get(name, get_args(hint)[0]) not in get_args(hint):
            raise ValueError(f"{name} {said[name]!r:.80}")
    return Model(**said)
