"""What two pieces of a tensor share, against NumPy's own indices."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpmp.checkpoint.extents import Box, Extent, overlaps, view, volume, whole, windows


@st.composite
def extents(draw: st.DrawFn, shape: tuple[int, ...]) -> Extent:
    box: Box = tuple(
        (start, draw(st.integers(start, n))) for n in shape for start in [draw(st.integers(0, n))]
    )
    start = draw(st.integers(0, volume(box)))
    return Extent(box, start, draw(st.integers(start, volume(box))))


@st.composite
def pairs(draw: st.DrawFn) -> tuple[tuple[int, ...], Extent, Extent]:
    shape = tuple(draw(st.lists(st.integers(0, 5), max_size=4)))
    return shape, draw(extents(shape)), draw(extents(shape))


def elements(shape: tuple[int, ...], extent: Extent) -> Any:
    """The extent's elements by their places in the whole tensor."""
    every = np.arange(volume(whole(shape))).reshape(shape)
    box = every[tuple(slice(*ends) for ends in extent.box)]
    return box.reshape(-1)[extent.start : extent.stop]


@given(pairs())
def test_what_two_extents_share_is_copied_once(
    given_pair: tuple[tuple[int, ...], Extent, Extent],
) -> None:
    shape, one, other = given_pair
    source, wanted = elements(shape, one), elements(shape, other)
    target, times = np.full(other.size, -1), np.zeros(other.size, dtype=int)
    for shared in overlaps(one, other):
        view(target, shared.other, shared.box)[...] = view(source, shared.one, shared.box)
        view(times, shared.other, shared.box)[...] += 1
    there = np.isin(wanted, source)
    assert (target == np.where(there, wanted, -1)).all() and (times == there).all()


@given(pairs())
def test_an_extent_is_few_boxes_in_its_order(
    given_pair: tuple[tuple[int, ...], Extent, Extent],
) -> None:
    shape, extent, _ = given_pair
    found = list(windows(extent))
    assert len(found) <= max(1, 2 * len(shape) - 1)
    own = elements(shape, extent)
    for window in found:
        run = own[window.at : window.at + volume(window.box)]
        assert (run == elements(shape, Extent(window.box, 0, volume(window.box)))).all()
    assert sum(volume(one.box) for one in found) == extent.size


@given(pairs(), st.sampled_from([1, 2, 4, 8]))
def test_in_bytes_it_is_the_same(
    given_pair: tuple[tuple[int, ...], Extent, Extent], itemsize: int
) -> None:
    _, one, other = given_pair
    shared = sum(volume(found.box) for found in overlaps(one, other))
    in_bytes = overlaps(one.in_bytes(itemsize), other.in_bytes(itemsize))
    assert sum(volume(found.box) for found in in_bytes) == itemsize * shared


def test_the_picture() -> None:
    """Rows 0 to 3 and columns 1 to 5 of (3, 6); elements [2, 9)."""
    found = [window.box for window in windows(Extent(((0, 3), (1, 5)), 2, 9))]
    assert found == [((0, 1), (3, 5)), ((1, 2), (1, 5)), ((2, 3), (1, 2))]


@pytest.mark.parametrize(
    "start, stop, expected", [(0, 3, (2, 5)), (-4, 2, (2, 4)), (3, 99, (5, 7)), (8, 9, (7, 7))]
)
def test_within(start: int, stop: int, expected: tuple[int, int]) -> None:
    part = Extent(((0, 9),), 2, 7).within(start, stop)
    assert (part.start, part.start + part.size) == expected or part.size == 0
