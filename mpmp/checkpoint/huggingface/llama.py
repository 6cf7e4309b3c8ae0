"""LLaMA (Touvron et al. 2023) as transformers has it."""

from __future__ import annotations

from mpmp.checkpoint.huggingface.family import REQUIRED, Family

_BLOCK = "model.layers.#"
_Q, _K, _V = (f"{_BLOCK}.self_attn.{one}_proj" for one in "qkv")

LLAMA = Family(
    kind="llama",
    model_type="llama",
    architectures={"LlamaForCausalLM": "words"},
    settings={
        "layers": ("num_hidden_layers", REQUIRED),
        "heads": ("num_attention_heads", REQUIRED),
        "kv_heads": ("num_key_value_heads", None),
        "width": ("hidden_size", REQUIRED),
        "hidden": ("intermediate_size", REQUIRED),
        "context": ("max_position_embeddings", 2048),
        "vocabulary": ("vocab_size", REQUIRED),
        "norm_eps": ("rms_norm_eps", 1e-6),
        "rope_base": ("rope_theta", 10_000.0),
        "tied": ("tie_word_embeddings", False),
    },
    demands={
        "hidden_act": ("silu", "swish"),
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "rope_type": ("default",),
        "partial_rotary_factor": (1.0,),
    },
    dropouts=("attention_dropout",),
    base="model.",
    heads=("lm_head.",),
    tensors={
        "embedding": ("model.embed_tokens",),
        "blocks.#.norm1": (f"{_BLOCK}.input_layernorm",),
        "blocks.#.attention.qkv": (_Q, _K, _V),
        "blocks.#.attention.q": (_Q,),
        "blocks.#.attention.kv": (_K, _V),
        "blocks.#.attention.out": (f"{_BLOCK}.self_attn.o_proj",),
        "blocks.#.norm2": (f"{_BLOCK}.post_attention_layernorm",),
        "blocks.#.mlp.up": (f"{_BLOCK}.mlp.gate_proj", f"{_BLOCK}.mlp.up_proj"),
        "blocks.#.mlp.down": (f"{_BLOCK}.mlp.down_proj",),
        "norm": ("model.norm",),
        "output": ("lm_head",),
    },
    buffers=r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",
    copies=r"lm_head\.weight",
    quiet="head_dim pretraining_tp",  # the head's width is looked at by itself
)
