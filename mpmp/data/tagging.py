"""Entity tagging as sequences of word pieces: what a model is asked of CoNLL sentences.

    words     Stabilized      approach   or     .           A word's first piece carries its tag;
    pieces    Stab ##ilized   approach   or     .           other pieces, [CLS] (^), [SEP] ($) and
    input   ^ Stab ##ilized   approach   or     .  $        padding are not counted.
    target  . O    .          O          O      O  .

A sentence of more pieces than the context holds is cut into windows that overlap by half. A word
that lies in two is counted in the one where it has more context to its nearer side, and nowhere
else: each word of a split is asked for once, in training, validation and prediction alike.

Shapes: B sequences, T tokens of the longest sequence of the batch, in steps of 16.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpmp.data import conll
from mpmp.data.objective import Sequences
from mpmp.data.wordpiece import WordPieces
from mpmp.errors import ConfigError, InputOutputError
from mpmp.parallel.counter import key_of, permute
from mpmp.parallel.stage import NOT_COUNTED

_STEP = 16
"""Of the lengths of batches: few lengths need few plans of messages."""
_NO_WORD = -1


def windows(pieces: Sequence[int], room: int) -> list[tuple[int, int]]:
    """Words (start, stop) of each window over words of so many ``pieces``, at most ``room`` each.

    The next window begins at a word, where half of this one is behind, or later where it would
    not reach further than this one.
    """
    offsets = np.concatenate(([0], np.cumsum(pieces)))
    found: list[tuple[int, int]] = []
    start = 0
    while True:
        stop = int(np.searchsorted(offsets, offsets[start] + room, side="right")) - 1
        found.append((start, stop))
        if stop == len(pieces):
            return found
        half, further = np.searchsorted(
            offsets, (offsets[start] + room // 2, offsets[stop + 1] - room)
        ).tolist()
        start = min(max(half, further), stop)


def owners(pieces: Sequence[int], spans: Sequence[tuple[int, int]]) -> NDArray[np.int64]:
    """The window in which each word has most context: pieces up to the nearer end of the window.

    Of two with as much, the earlier.
    """
    offsets = np.concatenate(([0], np.cumsum(pieces)))
    best = np.full(len(pieces), -1)
    owner = np.zeros(len(pieces), np.int64)
    for number, (start, stop) in enumerate(spans):
        before = offsets[start:stop] - offsets[start]
        behind = offsets[stop] - offsets[start + 1 : stop + 1]
        context = np.minimum(before, behind)
        better = context > best[start:stop]
        best[start:stop] = np.where(better, context, best[start:stop])
        owner[start:stop] = np.where(better, number, owner[start:stop])
    return owner


@dataclass(frozen=True, eq=False)
class Window:
    """A sequence: its pieces, and the word that is asked for at each place (or _NO_WORD).

    Words are numbered over the whole split.
    """

    pieces: NDArray[np.int64]
    words: NDArray[np.int64]


class TaggedWindows:
    """A split of sentences as windows; ``tags`` are the numbers of its words' tags."""

    def __init__(
        self, split: conll.Tagged, pieces: WordPieces, tags: Sequence[str], context: int
    ) -> None:
        self.split = split
        self.tags = _numbers(split, tags)
        self.windows: list[Window] = []
        cut = pieces.cut(word for one in split.sentences for word in one.words)
        first = 0
        for sentence in split.sentences:
            # Of a word that would fill a window alone, the end is left out.
            own = [cut[word][: context - 2] for word in sentence.words]
            self.windows += _cut(own, first, context - 2, pieces)
            first += len(own)
        self.lengths = np.asarray([len(one.pieces) for one in self.windows])
        self.asked = np.asarray([int((one.words != _NO_WORD).sum()) for one in self.windows])

    def rows(self, chosen: Sequence[int], length: int, padding: int) -> tuple[Tensor, Tensor]:
        """Inputs and words (B, T) of the chosen windows."""
        inputs = np.full((len(chosen), length), padding, np.int64)
        words = np.full((len(chosen), length), _NO_WORD, np.int64)
        for row, number in enumerate(chosen):
            window = self.windows[number]
            inputs[row, : len(window.pieces)] = window.pieces
            words[row, : len(window.words)] = window.words
        return torch.from_numpy(inputs), torch.from_numpy(words)


def _cut(
    pieces: list[tuple[int, ...]], first: int, room: int, vocabulary: WordPieces
) -> list[Window]:
    """The windows of a sentence whose first word has the number ``first``."""
    counts = [len(one) for one in pieces]
    spans = windows(counts, room)
    owner = owners(counts, spans)
    made = []
    for number, (start, stop) in enumerate(spans):
        ids, words = [vocabulary.begin], [_NO_WORD]
        for word in range(start, stop):
            ids += pieces[word]
            asked = first + word if owner[word] == number else _NO_WORD
            words += [asked] + [_NO_WORD] * (counts[word] - 1)
        made.append(Window(np.array([*ids, vocabulary.end]), np.array([*words, _NO_WORD])))
    return made


def tags_of(train: conll.Tagged) -> list[str]:
    """O, and B- and I- of each kind of entity that can be learnt."""
    kinds = conll.kinds(train.sentences)
    if not kinds:
        raise InputOutputError(
            f"{train.path}:1: every tag is O, so there is nothing to learn; give sentences with "
            "entities"
        )
    return [conll.OUTSIDE, *(f"{how}-{kind}" for kind in kinds for how in "BI")]


def _numbers(split: conll.Tagged, tags: Sequence[str]) -> NDArray[np.int64]:
    """The number of each word's tag; InputOutputError at the first that is not known."""
    known = {tag: number for number, tag in enumerate(tags)}
    for one in split.sentences:
        for place, tag in enumerate(one.tags):
            if tag not in known:
                kinds = ", ".join(sorted({tag[2:] for tag in tags if tag != conll.OUTSIDE}))
                raise InputOutputError(
                    f"{split.path}:{one.line + place}: the tag {tag} is not known; kinds of "
                    f"entities that the model learns are {kinds}"
                )
    return np.asarray([known[tag] for one in split.sentences for tag in one.tags])


class TaggingObjective:
    """The tags of words; see Objective.

    Windows of training are visited in an order that hangs on (seed, epoch) alone; those of the
    other splits by their length, so that few places are padding.
    """

    def __init__(
        self,
        train: TaggedWindows,
        validation: TaggedWindows,
        pieces: WordPieces,
        tags: Sequence[str],
        *,
        context: int,
        batch: int,
        seed: int,
    ) -> None:
        self.train, self.validated = train, validation
        self.vocabulary, self.padding = pieces.vocabulary, pieces.padding
        self.tags, self.sequences = len(tags), len(train.windows)
        self._context, self._batch, self._seed = context, batch, seed

    def training(self, step: int, start: int, stop: int) -> Sequences:
        """Rows ``start`` to ``stop`` of the step's batch."""
        chosen = self._chosen(step)
        samples = torch.arange(step * self._batch + start, step * self._batch + stop)
        length = self._length(self.train, chosen)
        return self._asked(self.train, chosen[start:stop], length, samples)[0]

    def counted(self, step: int) -> int:
        """Words of the step's batch, over all replicas."""
        return int(self.train.asked[self._chosen(step)].sum())

    def tokens(self, step: int) -> int:
        """Pieces of the step's batch."""
        return int(self.train.lengths[self._chosen(step)].sum())

    @property
    def validation_batches(self) -> int:
        """Batches of a validation."""
        return self.batches(self.validated)

    def validation(self, index: int) -> Sequences:
        """Batch ``index`` of a validation."""
        return self.batch(self.validated, index)[0]

    def scored(self) -> int:
        """Words of a validation."""
        return len(self.validated.tags)

    def batches(self, split: TaggedWindows) -> int:
        """Batches that all windows of a split are."""
        return -(-len(split.windows) // self._batch)

    def batch(self, split: TaggedWindows, index: int) -> tuple[Sequences, Tensor]:
        """Batch ``index`` of any split, and the number of the word at each place, if any, or -1."""
        order = np.argsort(split.lengths, kind="stable")
        chosen = order[index * self._batch : (index + 1) * self._batch].tolist()
        samples = torch.tensor(chosen, dtype=torch.int64)
        return self._asked(split, chosen, self._length(split, chosen), samples)

    def _chosen(self, step: int) -> list[int]:
        """The windows of the step's batch."""
        found = []
        for sample in range(step * self._batch, (step + 1) * self._batch):
            epoch, position = divmod(sample, self.sequences)
            found.append(permute(key_of(self._seed, f"data/{epoch}"), position, self.sequences))
        return found

    def _length(self, split: TaggedWindows, chosen: Sequence[int]) -> int:
        """T of the whole batch: dropout masks hang on it, so that it may not on the layout."""
        longest = int(split.lengths[chosen].max())
        return min(self._context, -(-longest // _STEP) * _STEP)

    def _asked(
        self, split: TaggedWindows, chosen: Sequence[int], length: int, samples: Tensor
    ) -> tuple[Sequences, Tensor]:
        inputs, words = split.rows(chosen, length, self.padding)
        tags = torch.from_numpy(split.tags)[words.clamp_min(0)]
        targets = tags.where(words != _NO_WORD, NOT_COUNTED)
        lengths = torch.from_numpy(split.lengths[chosen])
        return Sequences(inputs, targets, samples, lengths), words


def require_context(context: int) -> None:
    """ConfigError where no piece of a word would fit between [CLS] and [SEP]."""
    if context < 3:
        raise ConfigError(f"model.context {context} has no room for [CLS], a word and [SEP]")
