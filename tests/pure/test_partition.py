"""Contiguous cuts: they cover the range, in order, and differ by at most one."""

from __future__ import annotations

from math import prod

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpmp.programs.partition import factorisations, partition


@given(length=st.integers(0, 10_000), parts=st.integers(1, 200))
def test_pieces_are_those_of_array_split(length: int, parts: int) -> None:
    pieces = partition(length, parts)
    assert [list(range(*piece)) for piece in pieces] == [
        piece.tolist() for piece in np.array_split(np.arange(length), parts)
    ]
    sizes = [stop - start for start, stop in pieces]
    assert sum(sizes) == length
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize(("length", "parts"), [(-1, 2), (3, 0), (3, -1)])
def test_impossible_cuts_are_refused(length: int, parts: int) -> None:
    with pytest.raises(ValueError, match=f"length of {length} into {parts}"):
        partition(length, parts)


@given(number=st.integers(1, 120), factors=st.integers(1, 3))
def test_factorisations_are_all_of_them(number: int, factors: int) -> None:
    found = factorisations(number, factors)
    assert len(set(found)) == len(found)
    assert all(len(one) == factors and prod(one) == number for one in found)
    divisors = [one for one in range(1, number + 1) if number % one == 0]
    by_hand = {1: 1, 2: len(divisors), 3: sum(len(factorisations(d, 2)) for d in divisors)}
    assert len(found) == by_hand[factors]
