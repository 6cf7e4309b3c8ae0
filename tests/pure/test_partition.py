"""Contiguous cuts: they cover the range, in order, differ by at most one or balance costs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, pairwise
from math import prod

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpmp.programs.partition import balanced, factorisations, partition


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


# Forward times in ns of 25 layers of TransGAN on one P3 GPU, the first and the transformer blocks:
# github.com/DachengLi1/AMP, src/known_cost/transgan_P3_1.npy.
TRANSGAN = (
    240326, 2125025, 2033710, 2064705, 2036572, 2079248, 2038240, 2073765, 2028227, 2043486,
    2029896, 2071857, 2025604, 4008293, 4000664, 3999233, 3996372, 3996372, 3993034, 3994226,
    3993511, 3997326, 4003763, 4000902, 4006863,
)  # fmt: skip


def dearest_over_mean(costs: Sequence[float], pieces: list[tuple[int, int]]) -> float:
    sums = [sum(costs[start:stop]) for start, stop in pieces]
    return max(sums) / (sum(costs) / len(pieces))


@pytest.mark.parametrize(
    ("parts", "even", "best", "sizes"),
    [
        (2, 1.317, 1.013, [16, 9]),
        (4, 1.317, 1.096, [10, 6, 5, 4]),
        (8, 1.318, 1.315, None),
        (16, 1.756, 1.357, None),
    ],
)
def test_balance_of_a_measured_profile(
    parts: int, even: float, best: float, sizes: list[int] | None
) -> None:
    pieces = balanced(TRANSGAN, parts)
    assert dearest_over_mean(TRANSGAN, partition(25, parts)) == pytest.approx(even, abs=5e-4)
    assert dearest_over_mean(TRANSGAN, pieces) == pytest.approx(best, abs=5e-4)
    assert sizes is None or [stop - start for start, stop in pieces] == sizes


@given(costs=st.lists(st.integers(0, 9), min_size=1, max_size=9), parts=st.integers(1, 10))
def test_balanced_cuts_are_the_best_of_all(costs: list[int], parts: int) -> None:
    pieces = balanced(costs, parts)
    assert len(pieces) == parts
    assert [place for piece in pieces for place in range(*piece)] == list(range(len(costs)))
    if parts <= len(costs):
        assert all(start < stop for start, stop in pieces)
        cuts = combinations(range(1, len(costs)), parts - 1)
        every = (list(pairwise((0, *cut, len(costs)))) for cut in cuts)
        dearest = min(max(sum(costs[a:b]) for a, b in one) for one in every)
        assert max(sum(costs[a:b]) for a, b in pieces) == dearest


def test_equal_costs_are_cut_evenly() -> None:
    for length, parts in ((12, 4), (13, 4), (7, 3)):
        sizes = {stop - start for start, stop in balanced([1.0] * length, parts)}
        assert max(sizes) == -(-length // parts)


@pytest.mark.parametrize(("costs", "parts"), [([1.0], 0), ([1.0, -1.0], 1)])
def test_impossible_balances_are_refused(costs: list[float], parts: int) -> None:
    with pytest.raises(ValueError, match=f"into {parts} parts"):
        balanced(costs, parts)
