"""What a family of Hugging Face's models calls its settings and its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mpmp.checkpoint.merged import HeadOf

REQUIRED = object()
"""In place of a default: a folder must say it."""

_QUIET = (
    "_name_or_path architectures bos_token_id chunk_size_feed_forward cls_token_id do_sample dtype "
    "eos_token_id finetuning_task gradient_checkpointing id2label initializer_range label2id "
    "max_length model_type output_attentions output_hidden_states pad_token_id problem_type "
    "return_dict sep_token_id task_specific_params tokenizer_class torch_dtype torchscript "
    "transformers_version use_bfloat16 use_cache"
)


@dataclass(frozen=True)
class Family:
    """A kind of ours beside what ``transformers`` (5.x, and folders of 4.x) has of it."""

    kind: Literal["gpt", "llama", "bert"]
    model_type: str
    architectures: Mapping[str, HeadOf]
    """Those that are read, with what they score; the first of each is written."""
    settings: Mapping[str, tuple[str, Any]]
    """Ours: theirs, and what theirs is where a folder leaves it out."""
    demands: Mapping[str, tuple[Any, ...]]
    """Theirs that we have one answer to: the values that mean it, the first where left out."""
    dropouts: tuple[str, ...]
    """Probabilities of which we have one."""
    base: str
    """Prefix of the tensors that all architectures share; the bare model's have none."""
    heads: tuple[str, ...]
    """Prefixes of the others."""
    tensors: Mapping[str, tuple[str, ...]]
    """Ours: theirs, without .weight and .bias where all have them; ``#`` is a block's number.

    Several are stacked in ours; one that is named n times holds n of them, side by side.
    """
    turned: tuple[str, ...] = ()
    """Ends of layers whose weights are (in, out) in theirs and (out, in) in ours."""
    buffers: str = r"(?!)"
    """Tensors (a pattern) in which nothing is learnt."""
    copies: str = r"(?!)"
    """Tensors that are the embedding's, or another's, once more where weights are tied."""
    spare: str = r"(?!)"
    """Tensors that are learnt, and that mpmp has no place for."""
    quiet: str = ""
    """Settings that do not change what a model computes, beside those of all families."""

    def is_quiet(self, setting: str) -> bool:
        return setting in f"{_QUIET} {self.quiet}".split()

    def architecture(self, head: HeadOf) -> str:
        """The architecture that is written for a head."""
        return next(name for name, one in self.architectures.items() if one == head)
