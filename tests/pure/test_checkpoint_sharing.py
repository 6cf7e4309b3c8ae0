"""Who writes what: every element once, evenly, whatever ranks hold."""

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mpmp.checkpoint.extents import Extent, volume, whole
from mpmp.checkpoint.sharing import Holding, share_out, stored
from mpmp.errors import CheckpointError
from mpmp.programs.partition import partition

DTYPES = (torch.float64, torch.bfloat16, torch.uint8)


@st.composite
def worlds(draw: st.DrawFn) -> list[list[Holding]]:
    """Tensors cut by rows over some ranks, the boxes of copies by intervals at any place."""
    ranks = draw(st.integers(1, 5))
    held: list[list[Holding]] = [[] for _ in range(ranks)]
    for number in range(draw(st.integers(0, 4))):
        shape = (draw(st.integers(0, 7)), draw(st.integers(0, 5)))
        cuts = partition(shape[0], draw(st.integers(1, ranks)))
        for rank in range(ranks):
            box = (cuts[rank % len(cuts)], (0, shape[1]))
            ends = sorted(draw(st.lists(st.integers(0, volume(box)), max_size=2)))
            inner = [0, *ends, volume(box)] if rank >= len(cuts) else [0, volume(box)]
            for start, stop in zip(inner[:-1], inner[1:], strict=True):
                dtype = DTYPES[number % len(DTYPES)]
                held[rank].append(Holding(f"k/{number}", dtype, shape, Extent(box, start, stop)))
    return held


@given(worlds())
def test_every_element_is_written_once_by_who_holds_it(held: list[list[Holding]]) -> None:
    shares = share_out(held)
    times: Counter[tuple[object, int]] = Counter()
    for own, share in zip(held, shares, strict=True):
        holds = {
            (one.key, one.extent.box, element)
            for one in own
            for element in range(one.extent.start, one.extent.stop)
        }
        for piece, entry in share.pieces if share is not None else ():
            assert entry.size_bytes == piece.extent.size * piece.dtype.itemsize
            for element in range(piece.extent.start, piece.extent.stop):
                assert (piece.key, piece.extent.box, element) in holds
                times[(piece.key, piece.extent.box), element] += 1
    assert set(times.values()) <= {1}
    for key, tensor in stored(shares, [one for own in held for one in own]).items():
        written = sum(one.stop - one.start for one in tensor.pieces)
        assert written == volume(whole(tensor.shape)), key


def test_replicas_write_equal_parts() -> None:
    extent = Extent(((0, 1000), (0, 999)), 0, 999_000)
    every = [Holding(f"k/{n}", torch.float32, (1000, 999), extent) for n in range(3)]
    sizes = [one.size_bytes - len(one.header) for one in share_out([every] * 4) if one is not None]
    assert len(sizes) == 4 and max(sizes) - min(sizes) <= 4 and sum(sizes) == 3 * 999_000 * 4


def test_ranks_that_hold_different_tensors_of_one_name_are_told() -> None:
    extent = Extent(((0, 2),), 0, 2)
    one = Holding("k/x", torch.float32, (2,), extent)
    other = Holding("k/x", torch.float64, (2,), extent)
    with pytest.raises(CheckpointError, match="k/x is torch.float64 .* on rank 1"):
        share_out([[one], [other]])
