"""Models that transformers made, in folders, with what it computes of them: the oracle."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

TIME, VOCABULARY = 7, 37
LENGTHS = torch.tensor([7, 4, 6])
_BERT = {
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "hidden_size": 24,
    "intermediate_size": 40,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 11,
}
_LLAMA = {
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "hidden_size": 24,
    "intermediate_size": 40,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 11,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5e4},
}
_GPT2 = {
    "n_layer": 3,
    "n_head": 4,
    "n_embd": 24,
    "n_positions": 11,
    "vocab_size": VOCABULARY,
    "eos_token_id": 0,
}
CASES = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {**_GPT2, "n_inner": 40}),
    "gpt2-untied": ("GPT2LMHeadModel", "GPT2Config", {**_GPT2, "tie_word_embeddings": False}),
    "llama": ("LlamaForCausalLM", "LlamaConfig", _LLAMA),
    "llama-grouped": ("LlamaForCausalLM", "LlamaConfig", {**_LLAMA, "num_key_value_heads": 2}),
    "llama-tied": (
        "LlamaForCausalLM",
        "LlamaConfig",
        {**_LLAMA, "num_key_value_heads": 1, "tie_word_embeddings": True},
    ),
    "bert": ("BertForMaskedLM", "BertConfig", _BERT),
    "bert-tags": ("BertForTokenClassification", "BertConfig", {**_BERT, "num_labels": 5}),
}


def tokens():
    return torch.randint(VOCABULARY, (3, TIME), generator=torch.Generator().manual_seed(3))


def make(case: str, **changes):
    """A model of transformers with random weights, biases that are not zero among them."""
    import transformers

    model, config, settings = CASES[case]
    torch.manual_seed(5)
    made = getattr(transformers, model)(
        getattr(transformers, config)(**settings | changes)
    ).double()
    with torch.no_grad():
        for one in made.parameters():
            one.add_(0.05 * torch.randn(one.shape, dtype=one.dtype))
    return made.eval()


def logits(model, case: str):
    """What transformers computes of the tokens; of BERT with padding."""
    given = {"input_ids": tokens()}
    if case.startswith("bert"):
        given["attention_mask"] = (torch.arange(TIME) < LENGTHS[:, None]).long()
    with torch.no_grad():
        return model(**given).logits


def write(folder: Path, case: str) -> None:
    """A model's folder; beside its weights (float64) the logits in both precisions."""
    model = make(case)
    model.save_pretrained(folder)
    narrow = copy.deepcopy(model).float()
    expected = {"float64": logits(model, case), "float32": logits(narrow, case)}
    save_file(expected, folder / "expected.st")


# --- a folder without transformers ----------------------------------------------------------------

LAYERS, WIDTH, HIDDEN, CONTEXT = 3, 16, 20, 9


def gpt2_shapes(vocabulary):
    """GPT-2's tensors as its files have them."""
    D, F = WIDTH, HIDDEN
    block = {
        "ln_1.weight": (D,),
        "ln_1.bias": (D,),
        "attn.c_attn.weight": (D, 3 * D),
        "attn.c_attn.bias": (3 * D,),
        "attn.c_proj.weight": (D, D),
        "attn.c_proj.bias": (D,),
        "ln_2.weight": (D,),
        "ln_2.bias": (D,),
        "mlp.c_fc.weight": (D, F),
        "mlp.c_fc.bias": (F,),
        "mlp.c_proj.weight": (F, D),
        "mlp.c_proj.bias": (D,),
    }
    shapes = {f"h.{n}.{name}": one for n in range(LAYERS) for name, one in block.items()}
    shapes |= {"wte.weight": (vocabulary, D), "wpe.weight": (CONTEXT, D)}
    shapes |= {"ln_f.weight": (D,), "ln_f.bias": (D,)}
    return {f"transformer.{name}": one for name, one in shapes.items()}


def gpt2_config(vocabulary=VOCABULARY):
    return {
        "architectures": ["GPT2LMHeadModel"],
        "n_layer": LAYERS,
        "n_head": 4,
        "n_embd": WIDTH,
        "n_inner": HIDDEN,
        "n_positions": CONTEXT,
        "vocab_size": vocabulary,
    }


def write_gpt2(folder: Path, dtype=torch.float32, shards=1, vocabulary=VOCABULARY):
    """A folder with random weights; its tensors."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(7)
    tensors = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).mul(0.1).to(dtype)
        for name, shape in gpt2_shapes(vocabulary).items()
    }
    (folder / "config.json").write_text(json.dumps(gpt2_config(vocabulary)))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return tensors
    names, weight_map = list(tensors), {}
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        own = names[number::shards]
        save_file({name: tensors[name] for name in own}, folder / file)
        weight_map |= dict.fromkeys(own, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return tensors


def gpt2_as_ours(tensors):
    """The tensors under our names, block by block."""

    def stacked(one):
        return torch.stack([part.t() for part in one.split(WIDTH, dim=-1)])

    ours = {}
    for n in range(LAYERS):
        at = {name.split(f".h.{n}.")[1]: t for name, t in tensors.items() if f".h.{n}." in name}
        mine = {
            "norm1.weight": at["ln_1.weight"],
            "norm1.bias": at["ln_1.bias"],
            "norm2.weight": at["ln_2.weight"],
            "norm2.bias": at["ln_2.bias"],
            "attention.qkv.weight": stacked(at["attn.c_attn.weight"]),
            "attention.qkv.bias": at["attn.c_attn.bias"].view(3, WIDTH),
            "attention.out.weight": at["attn.c_proj.weight"].t(),
            "attention.out.bias": at["attn.c_proj.bias"],
            "mlp.up.weight": at["mlp.c_fc.weight"].t(),
            "mlp.up.bias": at["mlp.c_fc.bias"],
            "mlp.down.weight": at["mlp.c_proj.weight"].t(),
            "mlp.down.bias": at["mlp.c_proj.bias"],
        }
        ours |= {f"blocks.{n}.{name}": one for name, one in mine.items()}
    short = {"embedding": "wte", "position": "wpe", "norm": "ln_f"}
    for mine, their in short.items():
        for kind in ("weight", "bias"):
            if (one := tensors.get(f"transformer.{their}.{kind}")) is not None:
                ours[mine if mine == "position" else f"{mine}.{kind}"] = one
    return ours
