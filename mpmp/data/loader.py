"""A corpus of tokens, and the batches every step and every validation reads from it.

    tokens   t0 t1 t2 t3 t4 t5 t6 t7 t8 ..       context 4
    window 0 [inputs t0..t3, targets t1..t4]
    window 1             [inputs t4..t7, targets t5..t8]

Every token but the first is a target once. An epoch visits each window once, in an order that
hangs on (seed, epoch) alone: the n-th sequence of the training is the same on every layout, and
the position in the data is the number of the step, so there is nothing to save.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpmp.config import Data
from mpmp.data.corpus import read
from mpmp.data.tokens import Tokenizer, Tokens, tokenizer_of
from mpmp.errors import ConfigError
from mpmp.parallel.counter import key_of, permute


@dataclass(frozen=True, eq=False)
class Corpus:
    """The tokens of both splits and the bytes of text they stand for."""

    name: str
    tokenizer: Tokenizer
    train: Tokens
    validation: Tokens
    train_bytes: int
    validation_bytes: int
    sha256: str
    """Of the tokens, training first: what all ranks must agree on."""

    @property
    def vocabulary(self) -> int:
        return self.tokenizer.vocabulary


def load(data: Data) -> Corpus:
    """Read and encode the text of the settings; an end-of-text token follows each document."""
    tokenizer = tokenizer_of(data.tokenizer)
    text = read(data.path)
    train = _encode(tokenizer, text.train)
    validation = _encode(tokenizer, text.validation)
    digest = hashlib.sha256(train.data)
    digest.update(validation.data)
    return Corpus(
        name=text.name,
        tokenizer=tokenizer,
        train=train,
        validation=validation,
        train_bytes=sum(map(len, text.train)),
        validation_bytes=sum(map(len, text.validation)),
        sha256=digest.hexdigest(),
    )


def _encode(tokenizer: Tokenizer, documents: tuple[bytes, ...]) -> Tokens:
    pieces = [tokenizer.encode(b"")]  # of the right dtype, where there is no document
    end = [] if tokenizer.end_of_text is None else [tokenizer.end_of_text]
    for document in documents:
        pieces += [tokenizer.encode(document), np.asarray(end, pieces[0].dtype)]
    return np.concatenate(pieces)


@dataclass(frozen=True)
class Batches:
    """Sequences of ``context`` tokens, each with the token that follows every one of its tokens.

    Raises ConfigError where a split is too short for one batch.
    """

    corpus: Corpus
    context: int
    batch_size: int
    """Sequences of a step, over all ranks."""
    seed: int
    """Key of the order in which windows are visited."""
    eval_batches: int
    """Most batches a validation reads."""

    def __post_init__(self) -> None:
        for split, tokens in (
            ("training", self.corpus.train),
            ("validation", self.corpus.validation),
        ):
            if len(tokens) < self.context + 1:
                raise ConfigError(
                    f"the {split} split of {self.corpus.name!r} has {len(tokens)} tokens, and one "
                    f"sequence and its next token need {self.context + 1}; give a longer text or "
                    "lower model.context"
                )
            windows = self._windows_in(tokens)
            if windows < self.batch_size:
                raise ConfigError(
                    f"the {split} split of {self.corpus.name!r} has {windows} sequences of "
                    f"{self.context} tokens, and a batch needs {self.batch_size}; give a longer "
                    "text or lower train.batch or model.context"
                )

    @property
    def windows(self) -> int:
        """Windows of an epoch."""
        return self._windows_in(self.corpus.train)

    def windows_of(self, step: int) -> list[int]:
        """The window in each row of the step's batch."""
        first = step * self.batch_size
        return [self._window(sample) for sample in range(first, first + self.batch_size)]

    def batch(self, step: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Rows ``start`` to ``stop`` of the step's batch: inputs and targets.

        Returns two int64 tensors of shape [stop - start, context].
        """
        assert 0 <= start <= stop <= self.batch_size, (start, stop, self.batch_size)
        first = step * self.batch_size
        windows = [self._window(sample) for sample in range(first + start, first + stop)]
        return self._read(self.corpus.train, np.asarray(windows, np.int64))

    @property
    def validation_batches(self) -> int:
        """Batches of a validation."""
        return -(-len(self._validation_windows) // self.batch_size)

    def validation(self, index: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of batch ``index`` of a validation, in the order of the files.

        Two int64 tensors of shape [batch_size, context]; the last batch may have fewer rows.
        """
        assert 0 <= index < self.validation_batches, (index, self.validation_batches)
        first = index * self.batch_size
        windows = self._validation_windows[first : first + self.batch_size]
        return self._read(self.corpus.validation, windows)

    @property
    def scored_tokens(self) -> int:
        """Targets of a whole validation."""
        return len(self._validation_windows) * self.context

    @property
    def scored_bytes(self) -> float:
        """Bytes of text those targets stand for.

        End-of-text stands for none, every other token for the mean number of bytes a token of the
        validation split has. With byte tokens that mean is exactly 1. With a tokenizer file it is
        an estimate, good because the windows lie evenly over the split; unlike decoding it counts
        the text as it was before the tokenizer normalised it.
        """
        _, targets = self._read(self.corpus.validation, self._validation_windows)
        text_tokens = self._text_tokens(self.corpus.validation)
        return self._text_tokens(targets.numpy()) * (self.corpus.validation_bytes / text_tokens)

    def _text_tokens(self, tokens: NDArray[np.integer[Any]]) -> int:
        end = self.corpus.tokenizer.end_of_text
        return tokens.size if end is None else int(np.count_nonzero(tokens != end))

    def _window(self, sample: int) -> int:
        epoch, position = divmod(sample, self.windows)
        return permute(key_of(self.seed, f"data/{epoch}"), position, self.windows)

    @property
    def _validation_windows(self) -> NDArray[np.int64]:
        """All windows, or as many as are read, evenly apart so that every file has its share."""
        there = self._windows_in(self.corpus.validation)
        chosen = min(there, self.eval_batches * self.batch_size)
        return np.arange(chosen, dtype=np.int64) * there // chosen

    def _windows_in(self, tokens: Tokens) -> int:
        return (len(tokens) - 1) // self.context

    def _read(self, tokens: Tokens, windows: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        offsets = windows[:, None] * self.context + np.arange(self.context)
        inputs, targets = tokens[offsets], tokens[offsets + 1]
        return torch.from_numpy(inputs.astype(np.int64)), torch.from_numpy(targets.astype(np.int64))
