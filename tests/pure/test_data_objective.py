"""What is asked of a model: lengths and masks that hang on the sequence, not on the layout."""

from __future__ import annotations

import pytest
import torch

from mpmp.config import Data
from mpmp.data.loader import Batches, load
from mpmp.data.objective import LanguageObjective
from mpmp.parallel.stage import NOT_COUNTED


@pytest.fixture(scope="module")
def batches():
    return Batches(load(Data()), context=64, batch_size=32, seed=3, eval_batches=4)


def test_the_next_token_is_every_token_once(batches):
    objective = LanguageObjective(batches)
    rows = objective.training(5, 0, 32)
    assert torch.equal(rows.inputs_BT[:, 1:], rows.targets_BT[:, :-1])
    assert rows.lengths_B is None and rows.counted == objective.counted(5) == 32 * 64
    assert rows.samples_B.tolist() == list(range(5 * 32, 6 * 32))
    assert objective.vocabulary == 257 and objective.scored() == batches.scored_tokens


@pytest.mark.parametrize("masked", (False, True))
@pytest.mark.parametrize("shortest", (None, 1, 40, 64, 1000))
def test_pieces_of_a_batch_are_those_of_the_whole(batches, masked, shortest):
    objective = LanguageObjective(batches, masked=masked, shortest=shortest)
    whole = objective.training(2, 0, 32)
    assert objective.counted(2) == whole.counted
    for start, stop in ((0, 7), (7, 8), (8, 32)):
        piece, same = objective.training(2, start, stop), whole.rows(start, stop)
        assert torch.equal(piece.inputs_BT, same.inputs_BT)
        assert torch.equal(piece.targets_BT, same.targets_BT)
        assert torch.equal(piece.samples_B, same.samples_B)
        assert (piece.lengths_B is None) == (shortest is None)
        if shortest is not None:
            assert torch.equal(piece.lengths_B, same.lengths_B)


def test_lengths_lie_between_the_shortest_and_the_context(batches):
    objective = LanguageObjective(batches, shortest=10)
    lengths = torch.cat([objective.training(step, 0, 32).lengths_B for step in range(40)])
    assert lengths.min() == 10 and lengths.max() == 64
    rows = objective.training(0, 0, 32)
    for targets, length in zip(rows.targets_BT, rows.lengths_B.tolist(), strict=True):
        assert (targets[:length] != NOT_COUNTED).all() and (targets[length:] == NOT_COUNTED).all()


def test_masks_have_their_shares(batches):
    objective = LanguageObjective(batches, masked=True)
    assert objective.vocabulary == 258 and objective.mask == 257
    plain = LanguageObjective(batches)
    asked = hidden = same = tokens = 0
    for step in range(40):
        rows, words = objective.training(step, 0, 32), plain.training(step, 0, 32).inputs_BT
        chosen = rows.targets_BT != NOT_COUNTED
        assert torch.equal(rows.targets_BT[chosen], words[chosen])
        assert torch.equal(rows.inputs_BT[~chosen], words[~chosen])
        assert chosen.any(1).all(), "each sequence is asked for something"
        asked += int(chosen.sum())
        hidden += int((rows.inputs_BT == objective.mask).sum())
        same += int((chosen & (rows.inputs_BT == words)).sum())
        tokens += words.numel()
    assert asked / tokens == pytest.approx(0.15, abs=0.01)
    assert hidden / asked == pytest.approx(0.8, abs=0.02)
    assert same / asked == pytest.approx(0.1, abs=0.02)
    assert objective.scored() == sum(objective.validation(i).counted for i in range(4))


def test_nothing_is_asked_of_the_padding(batches):
    objective = LanguageObjective(batches, masked=True, shortest=3)
    rows = objective.training(1, 0, 32)
    padding = torch.arange(64) >= rows.lengths_B[:, None]
    assert (rows.targets_BT[padding] == NOT_COUNTED).all()
    assert (rows.inputs_BT[padding] == 0).all()
    assert (rows.targets_BT != NOT_COUNTED).any(1).all()
