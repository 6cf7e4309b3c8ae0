"""Entity tagging in one process: word pieces, windows, batches, scores, made-up sentences."""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpmp import commands
from mpmp.config import TASKS, Config, Data, Model
from mpmp.data import conll, generated, wordpiece
from mpmp.data.entities import MACRO, MICRO, WEIGHTED, report
from mpmp.data.tagging import (
    TaggedWindows,
    TaggingObjective,
    owners,
    require_context,
    tags_of,
    windows,
)
from mpmp.errors import ConfigError, InputOutputError
from mpmp.job.tagging import read_files
from mpmp.parallel.stage import NOT_COUNTED

pytest.importorskip("tokenizers")

TAG = st.sampled_from(["O", "O", "B-a", "I-a", "B-b", "I-b", "B-c-d", "I-c-d"])


# --- scores ---------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.tuples(TAG, TAG), min_size=1, max_size=8), min_size=1, max_size=6))
def test_the_report_is_that_of_seqeval(pairs: list[list[tuple[str, str]]]) -> None:
    metrics = pytest.importorskip("seqeval.metrics")
    gold = [[one for one, _ in sentence] for sentence in pairs]
    predicted = [[other for _, other in sentence] for sentence in pairs]
    ours = report(gold, predicted)
    if set(ours) == {MICRO, MACRO, WEIGHTED}:
        assert all(one.support == 0 and one.f1 == 0 for one in ours.values())
        return  # no entity anywhere: seqeval fails
    theirs = metrics.classification_report(gold, predicted, output_dict=True, zero_division=0)
    assert list(ours) == list(theirs)
    for kind, one in ours.items():
        names = ("precision", "recall", "f1-score", "support")
        expected = [float(theirs[kind][name]) for name in names]
        assert [one.precision, one.recall, one.f1, one.support] == pytest.approx(expected, 1e-12)


# --- word pieces ----------------------------------------------------------------------------------

LEARN = """
import argparse
from mpmp.data import wordpiece
print(wordpiece.learn(open(argparse.__file__).read().split(), 600))
"""


def test_the_same_words_give_the_same_pieces() -> None:
    """In another process, whose hash tables have another order, with other threads."""
    found = {
        subprocess.run(
            [sys.executable, "-c", LEARN],
            env={**os.environ, "RAYON_NUM_THREADS": threads},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for threads in "13"
    }
    text = wordpiece.learn(Path(argparse.__file__).read_text().split(), 600)
    assert found == {text + "\n"}


def test_every_word_has_pieces() -> None:
    pieces = wordpiece.WordPieces(wordpiece.learn(["low", "lower", "newer", "İ"] * 3, 40), "test")
    cut = pieces.cut(["low", "lower", "slow", "\ufe0f", "lowß", "low"])
    assert len(cut) == 5 and all(cut.values())
    assert len(cut["low"]) < len(cut["lower"]) + 1 and pieces.unknown not in cut["lower"]
    assert cut["\ufe0f"] == cut["lowß"] == (pieces.unknown,)
    # The characters are there whatever was asked for.
    least = wordpiece.WordPieces(wordpiece.learn(["abc"], 1), "test")
    assert least.vocabulary == len(wordpiece.SPECIAL) + 6


def test_other_tokenizers_are_refused() -> None:
    with pytest.raises(ConfigError, match="no tokenizer file"):
        wordpiece.WordPieces("{}", "x")
    from tokenizers import Tokenizer, models

    with pytest.raises(ConfigError, match=r"no \[CLS\] and no \[SEP\]"):
        wordpiece.WordPieces(Tokenizer(models.WordLevel({"[UNK]": 0}, "[UNK]")).to_str(), "x")


# --- windows --------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 5), min_size=1, max_size=40), st.integers(5, 20))
def test_windows_cover_every_word_and_overlap(pieces: list[int], room: int) -> None:
    spans = windows(pieces, room)
    assert spans[0][0] == 0 and spans[-1][1] == len(pieces)
    assert all(sum(pieces[start:stop]) <= room and start < stop for start, stop in spans)
    for (start, stop), (after, end) in zip(spans, spans[1:], strict=False):
        assert start < after <= stop < end
        # Half a window stands in both, or as much as lets the next reach further.
        half = sum(pieces[start:after]) < room // 2 + max(pieces)
        assert half or sum(pieces[after - 1 : stop + 1]) > room
    owner = owners(pieces, spans)
    for word, number in enumerate(owner):
        contexts = {
            n: min(sum(pieces[start:word]), sum(pieces[word + 1 : stop]))
            for n, (start, stop) in enumerate(spans)
            if start <= word < stop
        }
        assert contexts[number] == max(contexts.values())


def made(context: int, text: str | None = None, size: int = 300) -> TaggingObjective:
    if text is None:
        files = generated.generate()
        train, validation = (
            conll.Tagged(split, files[split].sentences[:150]) for split in ("train", "validation")
        )
    else:
        train = validation = conll.parse(text, "f.conll")
    words = [word for one in train.sentences for word in one.words]
    pieces = wordpiece.WordPieces(wordpiece.learn(words, size), "test")
    tags = tags_of(train)
    splits = [TaggedWindows(one, pieces, tags, context) for one in (train, validation)]
    return TaggingObjective(*splits, pieces, tags, context=context, batch=8, seed=3)


@pytest.mark.parametrize("context", (3, 5, 16, 128))
def test_each_word_of_a_split_is_asked_for_once(context: int) -> None:
    objective = made(context)
    for split in (objective.train, objective.validated):
        asked: Counter[int] = Counter()
        for index in range(objective.batches(split)):
            rows, words = objective.batch(split, index)
            numbers = words[words >= 0]
            asked.update(numbers.tolist())
            assert rows.counted == len(numbers)
            assert torch.equal(rows.targets_BT[words >= 0], torch.from_numpy(split.tags)[numbers])
            assert rows.inputs_BT.shape[1] <= context
            assert rows.lengths_B is not None and int(rows.lengths_B.max()) <= context
        assert asked == Counter(range(len(split.tags))) and set(asked.values()) == {1}
    batches = range(objective.validation_batches)
    assert objective.scored() == sum(objective.validation(one).counted for one in batches)


def test_rows_are_those_of_the_whole_batch() -> None:
    objective = made(12)
    for step in (0, 7, 10_000):
        whole = objective.training(step, 0, 8)
        assert whole.counted == objective.counted(step)
        assert whole.lengths_B is not None
        assert objective.tokens(step) == int(whole.lengths_B.sum())
        for start, stop in ((0, 3), (3, 8), (5, 5)):
            piece, same = objective.training(step, start, stop), whole.rows(start, stop)
            for name in ("inputs_BT", "targets_BT", "samples_B", "lengths_B"):
                assert torch.equal(getattr(piece, name), getattr(same, name)), name


def test_an_epoch_visits_each_window_once_in_its_own_order() -> None:
    text = "".join(f"w{number} B-x\n\n" for number in range(24))
    objective = made(16, text)
    assert objective.sequences == 24
    epochs = [
        torch.cat([objective.training(step, 0, 8).inputs_BT[:, 1:3] for step in steps]).tolist()
        for steps in (range(3), range(3, 6))
    ]
    assert epochs[0] != epochs[1] and sorted(epochs[0]) == sorted(epochs[1])


def test_the_first_piece_carries_the_tag() -> None:
    objective = made(
        64, "Redondo B-x\nBeach I-x\nBeachRed O\n" + "a O\nb O\nc O\n\nRed B-x\n", size=30
    )
    rows, words = objective.batch(objective.train, 0)
    order = np.argsort(objective.train.lengths, kind="stable").tolist()
    row, window = order.index(0), objective.train.windows[0]
    firsts = [place for place, word in enumerate(words[row].tolist()) if word >= 0]
    assert words[row, firsts].tolist() == [0, 1, 2, 3, 4, 5]
    assert rows.targets_BT[row, firsts].tolist() == [1, 2, 0, 0, 0, 0]
    length = len(window.pieces)
    assert firsts[0] == 1 and length > 2 + 6
    assert rows.inputs_BT[row, 0] == 2 and rows.inputs_BT[row, length - 1] == 3
    assert (rows.inputs_BT[row, length:] == 0).all()
    others = [place for place in range(rows.inputs_BT.shape[1]) if place not in firsts]
    assert (rows.targets_BT[row, others] == NOT_COUNTED).all()


def test_tags_that_cannot_be_learnt_are_named() -> None:
    train = conll.parse("a B-x\n", "train")
    pieces = wordpiece.WordPieces(wordpiece.learn(["a"], 10), "test")
    other = conll.parse("a O\na B-x\n\n\na B-y\n", "dev")
    with pytest.raises(InputOutputError, match=r"^dev:5: the tag B-y is not known; .* are x$"):
        TaggedWindows(other, pieces, tags_of(train), 16)
    with pytest.raises(InputOutputError, match=r"^train:1: every tag is O"):
        tags_of(conll.parse("a O\n", "train"))


# --- settings -------------------------------------------------------------------------------------


def test_files_are_named_by_folder_or_one_by_one(tmp_path: Path) -> None:
    for name in ("train", "dev", "test"):
        (tmp_path / f"{name}.conll").write_text(f"{name}\tB-x\n")
    one, two, three = (str(tmp_path / f"{name}.conll") for name in ("train", "dev", "test"))
    for data in (
        Data(path=str(tmp_path)),
        Data(path=one, validation=two, test=three),
        Data(path=three, validation=two),
    ):
        files = read_files(Config(data=data))
        words = [file.sentences[0].words[0] for file in files.values()]
        assert words == (["train", "dev", "test"] if data.path != three else ["test", "dev"])
    assert set(read_files(Config())) == set(conll.SPLITS)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: read_files(Config(data=Data(path=__file__))), "--data.validation"),
        (lambda: read_files(Config(data=Data(path=".", test="x"))), "is a folder"),
        (lambda: read_files(Config(data=Data(validation="x"))), "--data.path"),
        (lambda: require_context(2), "no room"),
        (lambda: Config(task="tagging"), "model.kind bert"),
        (lambda: Config("tagging", model=Model(kind="bert"), data=Data(shortest=1)), "shortest"),
    ],
)
def test_settings_that_do_not_fit_together(make: Callable[[], object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make()


def test_a_task_has_settings_of_its_own(tmp_path: Path) -> None:
    def parsed(*words: str) -> Config:
        return commands.parse("test", "", Config(), words, TASKS)

    recipe = tmp_path / "recipe.toml"
    recipe.write_text('task = "tagging"\n[model]\nwidth = 64\n')
    assert parsed() == TASKS["language"] and parsed("--task", "tagging") == TASKS["tagging"]
    found = parsed("--recipe", str(recipe), "--train.epochs", "2")
    assert found.task == "tagging" and found.model.kind == "bert"
    assert found.model.width == 64 and found.train.epochs == 2
    assert parsed("--recipe", str(recipe), "--task=language").model.width == 64


@pytest.mark.parametrize("text", ['task = "words"', "task = 3", "[task]"])
def test_a_task_that_is_not_known(text: str, tmp_path: Path, capsys: Any) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(text)
    with pytest.raises(SystemExit) as left:
        commands.parse("test", "", Config(), ["--recipe", str(recipe)], TASKS)
    assert left.value.code == 2
    assert "task must be language or tagging, not" in capsys.readouterr().err


# --- the made-up sentences ------------------------------------------------------------------------


def test_made_up_sentences_are_the_same_on_any_machine() -> None:
    files = generated.generate()
    assert {split: len(one.sentences) for split, one in files.items()} == generated.SIZES
    text = "\n".join(
        " ".join(f"{word}/{tag}" for word, tag in zip(one.words, one.tags, strict=True))
        for file in files.values()
        for one in file.sentences
    )
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    assert sha256[:16] == "98986c5034a84891"
    assert generated.generate(2)["train"] != files["train"]
    names = [
        {
            word
            for one in file.sentences
            for word, tag in zip(one.words, one.tags, strict=True)
            if tag != "O"
        }
        for file in (files["train"], files["test"])
    ]
    assert 0.3 < len(names[1] - names[0]) / len(names[1]) < 0.6
