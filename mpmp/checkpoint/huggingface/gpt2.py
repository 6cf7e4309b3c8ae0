"""GPT-2 (Radford et al. 2019) as transformers has it."""

from __future__ import annotations

from mpmp.checkpoint.huggingface.family import REQUIRED, Family

_BLOCK = "transformer.h.#"

GPT2 = Family(
    kind="gpt",
    model_type="gpt2",
    architectures={"GPT2LMHeadModel": "words"},
    settings={
        "layers": ("n_layer", REQUIRED),
        "heads": ("n_head", REQUIRED),
        "width": ("n_embd", REQUIRED),
        "hidden": ("n_inner", None),
        "context": ("n_positions", REQUIRED),
        "vocabulary": ("vocab_size", REQUIRED),
        "norm_eps": ("layer_norm_epsilon", 1e-5),
        "tied": ("tie_word_embeddings", True),
    },
    demands={
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    },
    dropouts=("embd_pdrop", "resid_pdrop", "attn_pdrop"),
    base="transformer.",
    heads=("lm_head.",),
    tensors={
        "embedding": ("transformer.wte",),
        "position": ("transformer.wpe.weight",),
        "blocks.#.norm1": (f"{_BLOCK}.ln_1",),
        "blocks.#.attention.qkv": (f"{_BLOCK}.attn.c_attn",) * 3,
        "blocks.#.attention.out": (f"{_BLOCK}.attn.c_proj",),
        "blocks.#.norm2": (f"{_BLOCK}.ln_2",),
        "blocks.#.mlp.up": (f"{_BLOCK}.mlp.c_fc",),
        "blocks.#.mlp.down": (f"{_BLOCK}.mlp.c_proj",),
        "norm": ("transformer.ln_f",),
        "output": ("lm_head",),
    },
    turned=("c_attn", "c_proj", "c_fc"),
    buffers=r"transformer\.h\.\d+\.attn\.(bias|masked_bias)",
    copies=r"lm_head\.weight",
    quiet=(
        "n_ctx reorder_and_upcast_attn summary_activation summary_first_dropout "
        "summary_proj_to_labels summary_type summary_use_proj"
    ),
)
