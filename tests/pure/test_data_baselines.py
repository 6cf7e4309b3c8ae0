"""Baselines beside a slow count in plain Python."""

from collections import Counter
from itertools import pairwise
from math import log
from pathlib import Path

import numpy as np
import pytest

from mpmp.config import Data
from mpmp.data.baselines import baselines, bits_per_byte
from mpmp.data.loader import Batches, Corpus, load
from mpmp.data.tokens import ByteTokenizer


class Numbers(ByteTokenizer):
    """A tokenizer of which only the size of the vocabulary matters."""

    def __init__(self, vocabulary: int, end_of_text: int | None) -> None:
        self.vocabulary, self.end_of_text = vocabulary, end_of_text


def reference(batches: Batches) -> dict[str, float]:
    """Mean nats per token, straight from the two formulas."""
    train, vocabulary = batches.corpus.train.tolist(), batches.corpus.vocabulary
    ones, firsts = Counter(train), Counter(train[:-1])
    twos = Counter(pairwise(train))
    nats = {"unigram": 0.0, "bigram": 0.0}
    scored = 0
    for index in range(batches.validation_batches):
        for inputs, targets in zip(*batches.validation(index), strict=True):
            for a, b in zip(inputs.tolist(), targets.tolist(), strict=True):
                p = (ones[b] + 1) / (len(train) + vocabulary)
                nats["unigram"] -= log(p)
                nats["bigram"] -= log((twos[a, b] + 64 * p) / (firsts[a] + 64))
                scored += 1
    assert scored == batches.scored_tokens
    return {name: total / scored for name, total in nats.items()}


@pytest.mark.parametrize("vocabulary", [5, 257, 1024, 1025, 100_000])
@pytest.mark.parametrize("part", [1 << 20, 97])
def test_scores_are_those_of_a_slow_count(
    vocabulary: int, part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if part < 1 << 20:
        monkeypatch.setattr("mpmp.data.baselines._PART", part)
    random = np.random.default_rng(vocabulary)
    tokens = (random.exponential(vocabulary / 8, 3000) % vocabulary).astype(np.uint32)
    corpus = Corpus(
        "random", Numbers(vocabulary, 0), tokens[:2000], tokens[2000:], 4000, 2000, sha256=""
    )
    batches = Batches(corpus, context=7, batch_size=3, seed=1, eval_batches=20)
    scores = baselines(batches)
    for name, nats in reference(batches).items():
        assert scores[name].nats == pytest.approx(nats, rel=1e-12)
        assert scores[name].bits == bits_per_byte(scores[name].nats, batches)


def test_a_byte_told_by_one_coin_costs_one_bit(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("abc " * 100)
    batches = Batches(load(Data(path=str(tmp_path / "a"))), 5, 2, 1, 100)
    # 40 bytes and end-of-text: the first is nobody's target, the last no byte
    assert (batches.scored_tokens, batches.scored_bytes) == (40, 39)
    assert bits_per_byte(log(2) * 39 / 40, batches) == pytest.approx(1)


def test_end_of_text_costs_bits_but_has_no_bytes() -> None:
    tokens = np.asarray([1, 2, 0, 1, 2, 0, 1], np.uint8)
    corpus = Corpus("ends", Numbers(3, 0), tokens, tokens, 10, 10, sha256="")
    batches = Batches(corpus, context=3, batch_size=1, seed=1, eval_batches=9)
    # 6 targets, 4 of them text; the split's 5 tokens of text stand for 10 bytes
    assert (batches.scored_tokens, batches.scored_bytes) == (6, 8)
    assert bits_per_byte(log(2), batches) == pytest.approx(6 / 8)


def test_every_token_is_text_where_there_is_no_end_of_text() -> None:
    tokens = np.asarray([1, 2, 0, 1, 2, 0, 1], np.uint8)
    corpus = Corpus("no ends", Numbers(3, None), tokens, tokens, 21, 21, sha256="")
    assert Batches(corpus, 3, 1, 1, 9).scored_bytes == 18


def test_the_standard_library_is_told_by_its_pairs() -> None:
    scores = baselines(Batches(load(Data()), context=128, batch_size=16, seed=1, eval_batches=40))
    assert 4.2 < scores["unigram"].bits < 5.0
    assert 3.2 < scores["bigram"].bits < 3.8
