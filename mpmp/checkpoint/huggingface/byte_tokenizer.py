"""The tokenizer of bytes as a tokenizer.json: a token is a byte, 256 ends a text.

Models that are trained without a tokenizer file have it. In the file a byte is a character that can
be printed, as GPT-2's byte-level alphabet has it (Radford et al. 2019).
"""

from __future__ import annotations

from typing import Any

END, MASK = "<|endoftext|>", "[MASK]"
_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}


def is_of_bytes(vocabulary: int, masked: bool) -> bool:
    """Whether a model that has no tokenizer file has as many tokens as bytes make."""
    return vocabulary == 257 + masked


def tokenizer_json(masked: bool) -> dict[str, Any]:
    """The file; ``masked``: with the token that hides a word."""
    special = [END, MASK] if masked else [END]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": 256 + number,
                "content": content,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for number, content in enumerate(special)
        ],
        "normalizer": None,
        "pre_tokenizer": _LEVEL,
        "post_processor": None,
        "decoder": _LEVEL,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {character: byte for byte, character in enumerate(_alphabet())},
            "merges": [],
        },
    }


def tokenizer_config_json(context: int, masked: bool) -> dict[str, Any]:
    """What transformers wants to know beside the file."""
    said = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
        "eos_token": END,
    }
    return said | ({"mask_token": MASK} if masked else {})


def _alphabet() -> list[str]:
    """A character for each byte: its own where it can be printed, else the next one behind 255."""
    printed = {*range(33, 127), *range(161, 173), *range(174, 256)}
    found, behind = [], 256
    for byte in range(256):
        found.append(chr(byte if byte in printed else behind))
        behind += byte not in printed
    return found
