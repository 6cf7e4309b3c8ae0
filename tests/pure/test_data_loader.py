"""Which tokens each row of each batch reads, however the rows are shared out."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mpmp.config import Data
from mpmp.data.loader import Batches, Corpus, load
from mpmp.data.tokens import ByteTokenizer
from mpmp.errors import ConfigError
from mpmp.programs.partition import partition


def corpus(train: int, validation: int) -> Corpus:
    """Tokens that count up, so that a row tells where it stood."""
    return Corpus(
        name="numbers",
        tokenizer=ByteTokenizer(),
        train=np.arange(train, dtype=np.uint32),
        validation=np.arange(validation, dtype=np.uint32),
        train_bytes=train,
        validation_bytes=validation - int(validation > 256),
        sha256="",
    )


def batches(
    train: int = 101,
    validation: int = 101,
    context: int = 5,
    batch_size: int = 4,
    seed: int = 1,
    eval_batches: int = 1000,
) -> Batches:
    return Batches(corpus(train, validation), context, batch_size, seed, eval_batches)


def test_load_ends_each_file_and_counts_bytes(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b"0123456789")
    loaded = load(Data(path=str(tmp_path / "text")))
    assert loaded.train.tolist() == [*b"012345678", 256]
    assert loaded.validation.tolist() == [*b"9", 256]
    assert (loaded.train_bytes, loaded.validation_bytes, loaded.vocabulary) == (9, 1, 257)
    assert loaded.train.dtype == np.uint16
    assert loaded.sha256 == load(Data(path=str(tmp_path / "text"))).sha256
    (tmp_path / "text").write_bytes(b"0123456780")
    assert loaded.sha256 != load(Data(path=str(tmp_path / "text"))).sha256


def test_the_default_corpus_loads() -> None:
    loaded = load(Data())
    assert loaded.train_bytes > 1e6
    ends = np.count_nonzero(loaded.train == 256)
    assert len(loaded.train) == loaded.train_bytes + ends
    assert loaded.train.dtype == np.uint16 and loaded.train.max() == 256


def test_targets_follow_inputs_and_windows_do_not_overlap() -> None:
    data = batches()
    inputs, targets = data.batch(0, 0, 4)
    assert inputs.dtype == targets.dtype == torch.int64
    assert inputs.shape == targets.shape == (4, 5)
    assert inputs.is_contiguous() and targets.is_contiguous()
    assert torch.equal(targets, inputs + 1)
    assert [row // 5 for row in inputs[:, 0].tolist()] == data.windows_of(0)
    assert all(row % 5 == 0 for row in inputs[:, 0].tolist())


@given(
    context=st.integers(1, 7),
    windows=st.integers(1, 40),
    rest=st.integers(0, 6),
    batch_size=st.integers(1, 9),
    seed=st.integers(-3, 3),
)
def test_each_window_is_visited_once_an_epoch(
    context: int, windows: int, rest: int, batch_size: int, seed: int
) -> None:
    length = context * windows + 1 + rest % context
    batch_size = min(batch_size, windows)
    data = batches(length, length, context, batch_size, seed)
    assert data.windows == windows
    steps = -(-3 * windows // batch_size)
    visited = [window for step in range(steps) for window in data.windows_of(step)]
    for epoch in range(3):  # epochs end inside a batch where the batch does not divide them
        assert sorted(visited[epoch * windows : (epoch + 1) * windows]) == list(range(windows))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    data = batches(train=1001, batch_size=20, context=5)
    steps = data.windows // 20
    first = [data.windows_of(step) for step in range(steps)]
    second = [data.windows_of(step + steps) for step in range(steps)]
    other = [
        batches(train=1001, batch_size=20, context=5, seed=2).windows_of(s) for s in range(steps)
    ]
    assert first != second and first != other
    visited = [window for step in first for window in step]
    assert visited != sorted(visited)
    assert first == [data.windows_of(step) for step in range(steps)]


@pytest.mark.parametrize("parts", [1, 2, 3, 5, 7, 9])
def test_the_parts_of_the_ranks_are_the_whole_batch(parts: int) -> None:
    data = batches(batch_size=7)
    for step in (0, 2, 123):  # 20 windows: the third batch goes over the end of an epoch
        whole = data.batch(step, 0, 7)
        cut = [data.batch(step, start, stop) for start, stop in partition(7, parts)]
        for side in (0, 1):
            assert torch.equal(torch.cat([part[side] for part in cut]), whole[side])


def test_a_batch_goes_over_the_end_of_an_epoch() -> None:
    data = batches(batch_size=8)  # 20 windows, so the third batch has 4 of each epoch
    assert sorted(data.windows_of(0) + data.windows_of(1) + data.windows_of(2)[:4]) == [*range(20)]
    inputs, _ = data.batch(2, 0, 8)
    assert [row // 5 for row in inputs[:, 0].tolist()] == data.windows_of(2)


def test_validation_reads_every_window_once_in_order() -> None:
    data = batches(validation=118)  # 23 windows of 5 and two tokens left over
    rows = [data.validation(index)[0] for index in range(data.validation_batches)]
    assert [len(row) for row in rows] == [4, 4, 4, 4, 4, 3]
    assert torch.equal(torch.cat(rows).ravel(), torch.arange(115))
    assert data.scored_tokens == 115 == data.scored_bytes


def test_a_short_validation_is_spread_over_the_split() -> None:
    data = batches(validation=1001, eval_batches=3)
    rows = torch.cat([data.validation(index)[0] for index in range(data.validation_batches)])
    assert len(rows) == 12 and data.scored_tokens == 60
    windows = (rows[:, 0] // 5).tolist()
    assert windows == [window * 200 // 12 for window in range(12)]
    _, targets = data.validation(0)
    assert torch.equal(targets, data.validation(0)[0] + 1)


def test_end_of_text_stands_for_no_byte() -> None:
    data = batches(validation=301)
    assert data.scored_tokens == 300
    assert data.scored_bytes == 299  # the numbers 1 to 300 hold one 256


@pytest.mark.parametrize(
    ("train", "validation", "numbers"),
    [
        (5, 101, "the training split of 'numbers' has 5 tokens, and .* need 6"),
        (101, 0, "the validation split of 'numbers' has 0 tokens, and .* need 6"),
        (19, 101, "the training split of 'numbers' has 3 sequences of 5 tokens, .* needs 4"),
        (101, 20, "the validation split of 'numbers' has 3 sequences of 5 tokens, .* needs 4"),
    ],
)
def test_a_text_too_short_is_refused_with_numbers(
    train: int, validation: int, numbers: str
) -> None:
    with pytest.raises(ConfigError, match=numbers) as caught:
        batches(train, validation)
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)


def test_the_shortest_text_is_enough() -> None:
    data = batches(6, 6, batch_size=1)
    assert data.batch(9, 0, 1)[1].tolist() == [[1, 2, 3, 4, 5]]
    assert data.validation_batches == 1


def test_a_file_of_one_byte_is_loaded_and_then_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a")
    with pytest.raises(ConfigError, match=r"training split .* has 0 tokens"):
        Batches(load(Data(path=str(tmp_path / "a"))), 1, 1, 1, 1)
