"""What a model is asked; here, to foretell each next token, or the tokens that are masked.

    next token     a b c d   ->   b c d e        every token counts once
    masked words   a # c x   ->   . b . d        15 % of the tokens: 80 % of them hidden by a mask,
                                                 10 % another token, 10 % as they are
                                                 (Devlin et al. 2018, section 3.1)

Lengths and masks hang on the seed and the number of the sequence alone, so they are the same on
every layout. Padding and what is not asked for has the target NOT_COUNTED.

Shapes: B sequences, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mpmp.data.loader import Batches
from mpmp.parallel import counter
from mpmp.parallel.stage import NOT_COUNTED

MASKED, HIDDEN, OTHER = 0.15, 0.8, 0.1
"""Share of tokens that are asked for; of those, shares that show the mask and another token."""


@dataclass(frozen=True)
class Sequences:
    """Rows of a batch."""

    inputs_BT: Tensor
    targets_BT: Tensor
    """What to foretell at each place, or NOT_COUNTED."""
    samples_B: Tensor
    """Numbers of the sequences in the whole training."""
    lengths_B: Tensor | None = None
    """Tokens before the padding; None where no sequence has any."""

    @property
    def counted(self) -> int:
        """Tokens whose loss counts."""
        return int((self.targets_BT != NOT_COUNTED).sum())

    def rows(self, start: int, stop: int) -> Sequences:
        """Rows ``start`` to ``stop``."""
        lengths = None if self.lengths_B is None else self.lengths_B[start:stop]
        return Sequences(
            self.inputs_BT[start:stop],
            self.targets_BT[start:stop],
            self.samples_B[start:stop],
            lengths,
        )


class Objective(Protocol):
    """What a model is asked in each batch of training and validation, on any layout."""

    vocabulary: int
    """Tokens that the model knows."""
    tags: int
    """Tags that a token may have; 0 where tokens are foretold."""
    sequences: int
    """Of an epoch."""

    def training(self, step: int, start: int, stop: int) -> Sequences:
        """Rows ``start`` to ``stop`` of the step's batch."""
        ...

    def counted(self, step: int) -> int:
        """Tokens of the step's batch, over all replicas, whose loss counts."""
        ...

    def tokens(self, step: int) -> int:
        """Tokens of the step's batch that are no padding."""
        ...

    @property
    def validation_batches(self) -> int:
        """Batches of a validation."""
        ...

    def validation(self, index: int) -> Sequences:
        """Batch ``index`` of a validation."""
        ...

    def scored(self) -> int:
        """Tokens that a whole validation counts."""
        ...


class LanguageObjective:
    """The tokens of a text: the next one of each, or those that are masked.

    ``masked``: masked words, else the next token. ``shortest``: sequences of training are cut to
    lengths drawn from there up to the context.
    """

    tags = 0

    def __init__(self, batches: Batches, *, masked: bool = False, shortest: int | None = None):
        self.batches, self.masked, self.shortest = batches, masked, shortest
        tokenizer = batches.corpus.tokenizer
        self.mask = tokenizer.vocabulary if tokenizer.mask is None else tokenizer.mask
        self.vocabulary = max(tokenizer.vocabulary, self.mask + 1 if masked else 0)
        self.sequences = batches.windows

    def training(self, step: int, start: int, stop: int) -> Sequences:
        """Rows ``start`` to ``stop`` of the step's batch."""
        inputs, targets = self.batches.batch(step, start, stop)
        first = step * self.batches.batch_size
        samples = torch.arange(first + start, first + stop)
        return self._asked("training", inputs, targets, samples, self._lengths(samples))

    def counted(self, step: int) -> int:
        """Tokens of the step's batch, over all replicas, whose loss counts."""
        size = self.batches.batch_size
        if not self.masked and self.shortest is None:
            return size * self.batches.context
        return self.training(step, 0, size).counted

    def tokens(self, step: int) -> int:
        """Tokens of the step's batch that are no padding."""
        size = self.batches.batch_size
        lengths = self._lengths(torch.arange(step * size, (step + 1) * size))
        return size * self.batches.context if lengths is None else int(lengths.sum())

    @property
    def validation_batches(self) -> int:
        """Batches of a validation."""
        return self.batches.validation_batches

    def validation(self, index: int) -> Sequences:
        """Batch ``index`` of a validation."""
        inputs, targets = self.batches.validation(index)
        first = index * self.batches.batch_size
        samples = torch.arange(first, first + len(inputs))
        return self._asked("validation", inputs, targets, samples, None)

    def scored(self) -> int:
        """Tokens that a whole validation counts."""
        if not self.masked:
            return self.batches.scored_tokens
        return sum(self.validation(i).counted for i in range(self.batches.validation_batches))

    def _asked(
        self, split: str, inputs: Tensor, targets: Tensor, samples: Tensor, lengths: Tensor | None
    ) -> Sequences:
        places = torch.arange(inputs.shape[1])
        if self.masked:
            words = inputs if lengths is None else inputs.where(places < lengths[:, None], -1)
            inputs, targets = self._mask(split, inputs, words, samples)
        if lengths is not None:
            padding = places >= lengths[:, None]
            inputs = inputs.masked_fill(padding, 0)
            targets = targets.masked_fill(padding, NOT_COUNTED)
        return Sequences(inputs, targets, samples, lengths)

    def _lengths(self, samples: Tensor) -> Tensor | None:
        if self.shortest is None:
            return None
        key = counter.key_of(self.batches.seed, "lengths")
        shortest = min(self.shortest, self.batches.context)
        choices = self.batches.context - shortest + 1
        return shortest + (counter.uniform(key, samples) * choices).long()

    def _mask(
        self, split: str, inputs: Tensor, words: Tensor, samples: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Inputs with some words hidden, and those words; ``words`` is -1 in the padding."""

        def uniform(name: str) -> Tensor:
            key = counter.key_of(self.batches.seed, f"mask/{split}/{name}")
            T = inputs.shape[1]
            return counter.uniform(key, samples[:, None] * T + torch.arange(T))

        drawn = uniform("asked").masked_fill(words < 0, 2.0)
        # The least likely word of a sequence is asked for in any case: none is without.
        asked = (drawn < MASKED) | (drawn == drawn.amin(1, keepdim=True))
        how = uniform("how")
        others = (uniform("other") * self.batches.corpus.vocabulary).long()
        shown = torch.where(how < HIDDEN, self.mask, inputs)
        shown = torch.where(how >= 1 - OTHER, others, shown)
        return shown.where(asked, inputs), inputs.where(asked, NOT_COUNTED)
