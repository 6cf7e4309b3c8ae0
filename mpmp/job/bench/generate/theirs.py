"""Their side: GPT-2 of transformers with our weights, and its ``generate``."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mpmp.errors import ConfigError
from mpmp.job.bench.generate.settings import Size

Continue = Callable[[Sequence[int], int], list[int]]
"""Gives so many tokens behind a prompt."""

_NAMES = {
    "embedding.": "transformer.wte.",
    "position": "transformer.wpe.weight",
    "norm.": "transformer.ln_f.",
    "blocks.": "transformer.h.",
    ".norm1.": ".ln_1.",
    ".norm2.": ".ln_2.",
    ".attention.qkv.": ".attn.c_attn.",
    ".attention.out.": ".attn.c_proj.",
    ".mlp.up.": ".mlp.c_fc.",
    ".mlp.down.": ".mlp.c_proj.",
}


def make(size: Size, weights: Mapping[str, Tensor]) -> Continue:
    """The model as transformers has it; ConfigError where the package is missing."""
    try:
        library: Any = importlib.import_module("transformers")
    except ImportError as error:
        raise ConfigError(
            f"bench generate runs against transformers, which cannot be imported ({error}); "
            "install it by pip install transformers, or use --against nothing"
        ) from None
    shape = size.model
    model = library.GPT2LMHeadModel(
        library.GPT2Config(
            vocab_size=size.vocabulary,
            n_positions=shape.context,
            n_embd=shape.width,
            n_layer=shape.layers,
            n_head=shape.heads,
            layer_norm_epsilon=shape.norm_eps,
            bos_token_id=None,
            eos_token_id=None,
        )
    ).eval()
    theirs = {_name(name): _matrix(name, one) for name, one in weights.items()}
    missing, unknown = model.load_state_dict(theirs, strict=False)
    assert not unknown and missing == ["lm_head.weight"], (missing, unknown)

    def tokens_behind(prompt: Sequence[int], count: int) -> list[int]:
        inputs = torch.tensor([list(prompt)])
        with torch.inference_mode():
            whole = model.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=count,
                do_sample=False,
                pad_token_id=0,
            )
        found: list[int] = whole[0, len(prompt) :].tolist()
        return found

    return tokens_behind


def _name(ours: str) -> str:
    for one, other in _NAMES.items():
        if one.startswith(".") or ours.startswith(one):
            ours = ours.replace(one, other, 1)
    return ours


def _matrix(name: str, ours: Tensor) -> Tensor:
    """GPT-2 has its matrices transposed, and queries, keys and values side by side."""
    if ".qkv." in name:
        ours = ours.flatten(0, 1)
    is_product = ".attention." in name or ".mlp." in name
    return ours.t() if is_product and ours.dim() == 2 else ours
