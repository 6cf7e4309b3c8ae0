"""How sequences are cut: every position once, work alike, blocks that are what a mask leaves."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpmp.programs.sequence import (
    blocks,
    contiguous,
    count,
    cut_sequence,
    positions,
    products,
    zigzag,
)

CUTS = {"contiguous": contiguous, "zigzag": zigzag}


def test_pictures():
    assert zigzag(8, 2) == (((0, 2), (6, 8)), ((2, 4), (4, 6)))
    assert zigzag(7, 2) == (((0, 2), (6, 7)), ((2, 4), (4, 6)))
    assert zigzag(3, 4) == (((0, 1),), ((1, 2),), ((2, 3),), ())
    assert contiguous(5, 3) == (((0, 2),), ((2, 4),), ((4, 5),))
    assert contiguous(1, 2) == (((0, 1),), ())
    assert positions(((0, 2), (6, 8))) == [0, 1, 6, 7]


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
@given(length=st.integers(0, 60), ranks=st.integers(1, 6))
def test_every_position_is_held_once(cut, length, ranks):
    held = [positions(pieces) for pieces in cut(length, ranks)]
    assert sorted(place for one in held for place in one) == list(range(length))
    assert all(one == sorted(one) for one in held)
    assert max(map(len, held)) - min(map(len, held)) <= 2


@pytest.mark.parametrize("causal", (True, False))
@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
@given(length=st.integers(0, 40), ranks=st.integers(1, 5))
def test_blocks_are_what_the_mask_leaves(cut, causal, length, ranks):
    """Marked block by block, the scores of each pair of ranks are those that a mask would show."""
    every = cut(length, ranks)
    for queries in every:
        for keys in every:
            q_at, k_at = np.array(positions(queries)), np.array(positions(keys))
            seen = np.zeros((len(q_at), len(k_at)), dtype=int)
            for block in blocks(queries, keys, causal):
                part = np.ones((block.stop - block.start, block.keys), dtype=int)
                seen[block.start : block.stop, : block.keys] += (
                    np.tril(part) if block.diagonal else part
                )
            expected = (k_at[None] <= q_at[:, None]) if causal else np.ones_like(seen)
            assert (seen == expected).all()


@pytest.mark.parametrize("ranks", (2, 3, 4, 8))
def test_zigzag_shares_causal_work_alike(ranks):
    length = 2 * ranks * 5
    work = products(zigzag(length, ranks), causal=True)
    assert set(work) == {length * (length + 1) // 2 // ranks}
    uneven = products(contiguous(length, ranks), causal=True)
    assert max(uneven) / min(uneven) > ranks


def test_a_rank_computes_one_block_a_round():
    for ranks in (2, 3, 4):
        for queries in zigzag(24, ranks):
            for keys in zigzag(24, ranks):
                assert len(blocks(queries, keys, True)) == 1


@pytest.mark.parametrize(
    ("kind", "causal", "cut"),
    (("ring", True, zigzag), ("ring", False, contiguous), ("ulysses", True, contiguous)),
)
def test_each_way_has_its_cut(kind, causal, cut):
    assert cut_sequence(13, 3, kind, causal) == cut(13, 3)
    assert sum(map(count, cut_sequence(13, 3, kind, causal))) == 13
