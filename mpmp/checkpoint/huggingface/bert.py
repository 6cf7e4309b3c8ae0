"""BERT (Devlin et al. 2019) as transformers has it."""

from __future__ import annotations

from mpmp.checkpoint.huggingface.family import REQUIRED, Family

_BLOCK = "bert.encoder.layer.#"
_QUERY, _KEY, _VALUE = (f"{_BLOCK}.attention.self.{one}" for one in ("query", "key", "value"))

BERT = Family(
    kind="bert",
    model_type="bert",
    architectures={
        "BertForMaskedLM": "words",
        "BertForPreTraining": "words",
        "BertForTokenClassification": "tags",
        "BertModel": "",
    },
    settings={
        "layers": ("num_hidden_layers", REQUIRED),
        "heads": ("num_attention_heads", REQUIRED),
        "width": ("hidden_size", REQUIRED),
        "hidden": ("intermediate_size", REQUIRED),
        "context": ("max_position_embeddings", REQUIRED),
        "vocabulary": ("vocab_size", REQUIRED),
        "token_types": ("type_vocab_size", 2),
        "norm_eps": ("layer_norm_eps", 1e-12),
    },
    demands={
        "hidden_act": ("gelu", "gelu_python"),
        "position_embedding_type": ("absolute",),
        "is_decoder": (False,),
        "add_cross_attention": (False,),
        "tie_word_embeddings": (True,),
    },
    dropouts=("hidden_dropout_prob", "attention_probs_dropout_prob"),
    base="bert.",
    heads=("cls.", "classifier."),
    tensors={
        "embedding": ("bert.embeddings.word_embeddings",),
        "position": ("bert.embeddings.position_embeddings.weight",),
        "token_types": ("bert.embeddings.token_type_embeddings.weight",),
        "embedding_norm": ("bert.embeddings.LayerNorm",),
        "blocks.#.attention.qkv": (_QUERY, _KEY, _VALUE),
        "blocks.#.attention.out": (f"{_BLOCK}.attention.output.dense",),
        "blocks.#.norm1": (f"{_BLOCK}.attention.output.LayerNorm",),
        "blocks.#.mlp.up": (f"{_BLOCK}.intermediate.dense",),
        "blocks.#.mlp.down": (f"{_BLOCK}.output.dense",),
        "blocks.#.norm2": (f"{_BLOCK}.output.LayerNorm",),
        "head.transform": ("cls.predictions.transform.dense",),
        "head.norm": ("cls.predictions.transform.LayerNorm",),
        "head.bias": ("cls.predictions.bias",),
        "tags": ("classifier",),
    },
    buffers=r"bert\.embeddings\.(position_ids|token_type_ids)",
    copies=r"cls\.predictions\.decoder\.(weight|bias)",
    spare=r"(bert\.pooler|cls\.seq_relationship)\..*",
    quiet=(
        "classifier_dropout directionality pooler_fc_size pooler_num_attention_heads "
        "pooler_num_fc_layers pooler_size_per_head pooler_type"
    ),
)
