"""config.json of a Hugging Face folder as settings of a model, and back.

What a folder says and we cannot compute is refused; what we do not know is named in a note. So a
model is never read as another one without a word.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from mpmp.checkpoint.huggingface.bert import BERT
from mpmp.checkpoint.huggingface.family import REQUIRED, Family
from mpmp.checkpoint.huggingface.gpt2 import GPT2
from mpmp.checkpoint.huggingface.llama import LLAMA
from mpmp.checkpoint.merged import Described, HeadOf
from mpmp.config import Model
from mpmp.errors import CheckpointError, ConfigError

FAMILIES = (GPT2, LLAMA, BERT)
_DEMANDS: dict[str, tuple[Any, ...]] = {
    "is_encoder_decoder": (False,),
    "pruned_heads": (None, {}),
    "quantization_config": (None,),
}
"""Of all families; see Family."""


# --- reading --------------------------------------------------------------------------------------


def understood(said: Mapping[str, Any], where: str) -> Described:
    """The model that a config.json describes; ``where`` is what messages call the folder.

    Raises ConfigError for a model that mpmp does not have, CheckpointError for values that are of
    the wrong type.
    """
    family, architecture = _family(said, where)
    said = _plain_rope(said, where)
    _refuse_others(family, said, where)
    values = {}
    for ours, (theirs, default) in family.settings.items():
        value = said.get(theirs, default)
        if value is REQUIRED:
            raise CheckpointError(f"config.json of {where} does not say {theirs}")
        values[ours] = _typed(ours, theirs, value, where)
    head = values["width"] // max(1, values["heads"])
    if said.get("head_dim") not in (None, head):
        raise ConfigError(
            f"config.json of {where} says head_dim {said['head_dim']}, but heads of mpmp share the "
            f"width out: {values['width']} features over {values['heads']} heads are {head} each"
        )
    notes = _unknown(family, said, where)
    dropouts = {key: _typed("dropout", key, said.get(key, 0.0), where) for key in family.dropouts}
    # LLaMA drops nothing but attention weights.
    if len({*dropouts.values(), *([0.0] if family.kind == "llama" else [])}) == 1:
        values["dropout"] = next(iter(dropouts.values()))
    else:
        told = ", ".join(f"{key} {value}" for key, value in dropouts.items())
        notes += (f"{where} drops by {told}; training drops by --model.dropout everywhere",)
    try:
        model = Model(kind=family.kind, weights=where, **values)
    except ConfigError as error:
        raise ConfigError(f"config.json of {where} describes what mpmp has not: {error}") from None
    scores = family.architectures[architecture]
    tags = _tags(said, where) if scores == "tags" else ()
    return Described(model, tags, scores, theirs=True, notes=notes)


def _family(said: Mapping[str, Any], where: str) -> tuple[Family, str]:
    found = said.get("architectures") or [None]
    name = found[0] if isinstance(found, list) else found
    for family in FAMILIES:
        if isinstance(name, str) and name in family.architectures:
            return family, name
    known = ", ".join(name for family in FAMILIES for name in family.architectures)
    raise ConfigError(
        f"config.json of {where} names the architecture {name!r:.80}, and mpmp reads {known}"
    )


_ROPE = {name: name for name in ("rope_type", "rope_theta", "partial_rotary_factor")}
_ROPE["type"] = "rope_type"


def _plain_rope(said: Mapping[str, Any], where: str) -> dict[str, Any]:
    """transformers 5 says in ``rope_parameters`` what 4 says in two settings."""
    found = dict(said)
    for key in ("rope_scaling", "rope_parameters"):
        inner = found.pop(key, None)
        if not isinstance(inner, dict | None):
            raise CheckpointError(
                f"config.json of {where} says {key} {inner!r:.80}, which should be settings by name"
            )
        # What is not of positions keeps its place, and is no setting of the model.
        found |= {_ROPE.get(name, f"{key}.{name}"): one for name, one in (inner or {}).items()}
    return found


def _refuse_others(family: Family, said: Mapping[str, Any], where: str) -> None:
    """ConfigError for a setting that would make another function of the same weights."""
    for key, values in {**_DEMANDS, **family.demands}.items():
        value = said.get(key, values[0])
        if value not in values:
            wanted = " or ".join(repr(one) for one in values)
            raise ConfigError(
                f"config.json of {where} says {key} {value!r:.80}, which mpmp does not compute for "
                f"{family.model_type}; it takes {wanted}"
            )


def _unknown(family: Family, said: Mapping[str, Any], where: str) -> tuple[str, ...]:
    known = {theirs for theirs, _ in family.settings.values()}
    known |= {*family.dropouts, *family.demands, *_DEMANDS}
    rest = [key for key in sorted(said) if key not in known and not family.is_quiet(key)]
    if not rest:
        return ()
    told = ", ".join(f"{key} {said[key]!r:.40}" for key in rest)
    return (f"config.json of {where} says what mpmp does not know and leaves out: {told}",)


_KINDS: dict[str, tuple[type, ...]] = {
    "tied": (bool,),
    "dropout": (int, float),
    "norm_eps": (int, float),
    "rope_base": (int, float),
    "kv_heads": (int, type(None)),
    "hidden": (int, type(None)),
}


def _typed(ours: str, theirs: str, value: Any, where: str) -> Any:
    kinds = _KINDS.get(ours, (int,))
    try:
        if type(value) not in kinds:  # True would pass for an integer
            raise TypeError
        return float(value) if float in kinds else value
    except (TypeError, OverflowError):
        raise CheckpointError(
            f"config.json of {where} says {theirs} {value!r:.80}, no such value"
        ) from None


def _tags(said: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """Names of the classifier's rows."""
    names = said.get("id2label", {"0": "LABEL_0", "1": "LABEL_1"})
    try:
        found = {int(number): str(name) for number, name in names.items()}
    except (AttributeError, TypeError, ValueError):
        found = {}
    if not found or sorted(found) != list(range(len(found))):
        raise CheckpointError(
            f"config.json of {where} says id2label {names!r:.80}, which should name the classes "
            "0, 1, .. without a gap"
        )
    return tuple(found[number] for number in range(len(found)))


# --- what a run may change ------------------------------------------------------------------------

_FREE = ("context", "dropout", "seed", "weights", "top_k", "capacity", "balance")


def refuse_contradiction(model: Model, described: Described) -> None:
    """ConfigError where settings of a run are not those of the model that it begins from.

    Sequences may be shorter than the model was made for. A vocabulary that was not set is
    compared with the tensors only.
    """
    theirs = described.model
    where = theirs.weights
    skipped = set(_FREE)
    skipped |= set() if model.kind == "llama" else {"rope_base"}
    skipped |= set() if model.kind == "bert" else {"token_types"}
    skipped |= set() if model.vocabulary is not None else {"vocabulary"}
    full = [
        replace(one, kv_heads=one.num_kv_heads, hidden=one.num_hidden) for one in (model, theirs)
    ]
    for name in (one.name for one in fields(Model) if one.name not in skipped):
        mine, other = (getattr(one, name) for one in full)
        if mine != other:
            raise ConfigError(
                f"model.{name} is {mine!r} in this run and {other!r} in {where}, which it begins "
                "from; leave the setting out or begin from other weights"
            )
    if model.context > theirs.context:
        raise ConfigError(
            f"model.context {model.context} is more than the {theirs.context} tokens that {where} "
            f"was made for; use at most {theirs.context}"
        )


def _full(model: Model) -> Model:
    """With nothing left out that follows from the rest."""
    return replace(model, kv_heads=model.num_kv_heads, hidden=model.num_hidden)


# --- writing --------------------------------------------------------------------------------------


def config_json(
    model: Model, vocabulary: int, tags: tuple[str, ...], dtype: str, special: Mapping[str, int]
) -> dict[str, Any]:
    """The config.json of a model; ``special``: numbers of the tokens that begin, end and fill up.

    Raises ConfigError for a model that transformers has no architecture for.
    """
    family = family_of(model)
    head: HeadOf = "tags" if tags else "words"
    said: dict[str, Any] = {
        "architectures": [family.architecture(head)],
        "model_type": family.model_type,
        **{key: values[0] for key, values in family.demands.items()},
        **{key: special.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")},
        "torch_dtype": dtype,
    }
    full = replace(_full(model), vocabulary=vocabulary)
    said |= {theirs: getattr(full, ours) for ours, (theirs, _) in family.settings.items()}
    said |= dict.fromkeys(family.dropouts, model.dropout)
    if tags:
        said["id2label"] = {str(number): name for number, name in enumerate(tags)}
        said["label2id"] = {name: number for number, name in enumerate(tags)}
    for key in ("rope_type", "partial_rotary_factor"):  # not written: what is left out is meant
        said.pop(key, None)
    return said


def family_of(model: Model) -> Family:
    """The family whose function a model computes; ConfigError where there is none."""
    why = ""
    if model.experts:
        why = f"has {model.experts} experts"
    elif model.kind == "gpt" and model.num_kv_heads != model.heads:
        why = f"has {model.num_kv_heads} KV heads for {model.heads} heads"
    elif model.kind == "bert" and not model.tied:
        why = "has an output layer of its own"
    for family in FAMILIES:
        if family.kind == model.kind and not why:
            return family
    kinds = ", ".join(family.kind for family in FAMILIES)
    raise ConfigError(
        f"the model of kind {model.kind} {why or 'has no name there'} and cannot be written as a "
        f"Hugging Face folder; {kinds} can, where they are as published"
    )
