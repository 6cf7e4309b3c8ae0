"""Unigram and bigram models, scored on the tokens a validation scores: what a GPT must beat.

    unigram  p(b)     = (count(b) + 1) / (tokens + vocabulary)                        add-one
    bigram   p(b | a) = (count(a b) + 64 p(b)) / (count(a as a first token) + 64)     Dirichlet

The bigram backs off to the unigram as if each first token had been seen 64 times more, followed
by tokens drawn from the unigram (MacKay and Peto 1995). Counts are those of the training split;
the bigram, like the GPT, is given the first token of each window.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log

import numpy as np
from numpy.typing import NDArray

from mpmp.data.loader import Batches
from mpmp.data.tokens import Tokens

# A strength of 16, 64, 256, 1000 gave 1.840, 1.815, 1.811, 1.836 bits per byte with 32,000 byte
# pairs on the default corpus; with bytes it is of no account.
_STRENGTH = 64.0
_PART = 1 << 20  # tokens counted at once: NumPy counts 64-bit copies


@dataclass(frozen=True)
class Score:
    """A model's loss on the validation targets."""

    nats: float
    """Mean per token."""
    bits: float
    """Per byte of text."""


def baselines(batches: Batches) -> dict[str, Score]:
    """The scores of ``"unigram"`` and ``"bigram"`` on every target of a whole validation."""
    train, vocabulary = batches.corpus.train, batches.corpus.vocabulary
    rows = [batches.validation(index) for index in range(batches.validation_batches)]
    inputs = np.concatenate([inputs.numpy().ravel() for inputs, _ in rows])
    targets = np.concatenate([targets.numpy().ravel() for _, targets in rows])

    counts = _counts(train, vocabulary)
    unigram = ((counts + 1) / (len(train) + vocabulary))[targets]
    counts[train[-1]] -= 1  # the last token is nobody's first token
    pairs = _pair_counts(train, inputs * vocabulary + targets, vocabulary)
    bigram = (pairs + _STRENGTH * unigram) / (counts[inputs] + _STRENGTH)

    nats = {"unigram": -np.log(unigram).mean(), "bigram": -np.log(bigram).mean()}
    return {
        name: Score(float(one), bits_per_byte(float(one), batches)) for name, one in nats.items()
    }


def bits_per_byte(nats: float, batches: Batches) -> float:
    """A whole validation's mean loss in nats per token as bits per byte of its text.

    bits per byte = nats x scored tokens / ln 2 / bytes the scored tokens stand for, so that losses
    under different tokenizers compare. End-of-text is scored but stands for no byte.
    """
    return nats * batches.scored_tokens / log(2) / batches.scored_bytes


def _counts(train: Tokens, vocabulary: int) -> NDArray[np.int64]:
    counts = np.zeros(vocabulary, np.int64)
    for start in range(0, len(train), _PART):
        counts += np.bincount(train[start : start + _PART], minlength=vocabulary)
    return counts


def _pair_counts(train: Tokens, wanted: NDArray[np.int64], vocabulary: int) -> NDArray[np.int64]:
    """How often each wanted pair (first x vocabulary + second) stands in the training tokens.

    A small vocabulary is counted in one table of all pairs; a large one (100,000 tokens make 10^10
    pairs) by sorting, and only the wanted pairs are kept.
    """
    dense = vocabulary**2 <= _PART
    keys, where = (
        (np.arange(vocabulary**2), wanted) if dense else np.unique(wanted, return_inverse=True)
    )
    counts = np.zeros(len(keys), np.int64)
    for start in range(0, len(train) - 1, _PART):
        part = train[start : start + _PART + 1].astype(np.int64)
        codes = part[:-1] * vocabulary + part[1:]
        if dense:
            counts += np.bincount(codes, minlength=len(keys))
        else:
            found, times = np.unique(codes, return_counts=True)
            at = np.searchsorted(found, keys).clip(max=len(found) - 1)
            counts += np.where(found[at] == keys, times[at], 0)
    return counts[where]
