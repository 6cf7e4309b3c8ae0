"""What is learnt in a bench: real text in as many tokens as the model's vocabulary has."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpmp.data.corpus import read
from mpmp.data.loader import Corpus
from mpmp.data.tokens import Tokens

_MOST_BYTES = 4 << 20


@dataclass
class Pairs:
    """A token is two bytes, numbered modulo the vocabulary: nothing to train, any size will do."""

    vocabulary: int
    end_of_text: int | None = None
    mask: int | None = None
    file: str | None = None

    def encode(self, text: bytes | str) -> Tokens:
        data = text.encode() if isinstance(text, str) else text
        pairs = np.frombuffer(data[: len(data) // 2 * 2], np.uint8).reshape(-1, 2).astype(np.uint32)
        return np.asarray((pairs[:, 0] * 257 + pairs[:, 1]) % self.vocabulary, np.uint32)

    def decode(self, ids: Sequence[int] | NDArray[Any]) -> str:
        return " ".join(map(str, ids))  # the bytes are lost


def corpus(vocabulary: int) -> Corpus:
    """The beginning of the standard library, the same on all ranks of a Python version."""
    text = read(None)
    sides = [b"".join(one)[:_MOST_BYTES] for one in (text.train, text.validation)]
    tokenizer = Pairs(vocabulary)
    train, validation = map(tokenizer.encode, sides)
    return Corpus(
        name=text.name,
        tokenizer=tokenizer,
        train=train,
        validation=validation,
        train_bytes=len(sides[0]),
        validation_bytes=len(sides[1]),
        sha256=hashlib.sha256(train.tobytes() + validation.tobytes()).hexdigest(),
    )
