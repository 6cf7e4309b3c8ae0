"""The heap of a share against a model: nothing overlaps, what is given back is used again."""

from __future__ import annotations

import gc
import os
import tempfile
import threading
import weakref
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpmp.comm.share import PAGE_BYTES, Heap

ROOM = 64 * PAGE_BYTES


@pytest.fixture(scope="module")
def descriptor() -> Iterator[int]:
    with tempfile.TemporaryFile() as file:
        yield file.fileno()


def pages(nbytes: int) -> int:
    return max(1, -(-nbytes // PAGE_BYTES))


def pages_of(start: int, nbytes: int) -> range:
    return range(start // PAGE_BYTES, start // PAGE_BYTES + pages(nbytes))


# A number of bytes to take, or the place in the list of what to give back.
steps = st.lists(
    st.one_of(
        st.tuples(st.just("take"), st.integers(0, 20 * PAGE_BYTES)),
        st.tuples(st.just("give back"), st.integers(0, 1 << 30)),
    ),
    max_size=60,
)


@settings(deadline=None, max_examples=300)
@given(steps=steps)
def test_against_a_model(steps: list[tuple[str, int]], descriptor: int) -> None:
    heap = Heap(descriptor, ROOM)
    taken: dict[int, int] = {}  # start: bytes asked for
    for what, number in steps:
        if what == "take":
            used = {page for held in taken.items() for page in pages_of(*held)}
            start = heap.take(number)
            free = [p not in used for p in range(ROOM // PAGE_BYTES)]
            gaps = "".join("." if one else "x" for one in free)
            first = gaps.find("." * pages(number))
            if start is None:
                assert first < 0, "there was room"
                continue
            assert start % PAGE_BYTES == 0 and 0 <= start <= ROOM - number
            assert not used & set(pages_of(start, number)), "two hold the same page"
            assert start == first * PAGE_BYTES, "first fit"
            assert os.fstat(descriptor).st_size >= start + pages(number) * PAGE_BYTES
            taken[start] = number
        elif taken:
            start = sorted(taken)[number % len(taken)]
            heap.give_back(start, taken.pop(start))
    for start, number in taken.items():
        heap.give_back(start, number)
    if heap._top:
        assert heap.take(heap._top) == 0, "all that was freed is one piece again"
    assert heap._free == []


def test_no_room_is_none_and_harms_nothing(descriptor: int) -> None:
    heap = Heap(descriptor, ROOM)
    assert heap.take(ROOM + 1) is None
    assert heap.take(ROOM) == 0
    assert heap.take(1) is None
    heap.give_back(0, ROOM)
    assert [heap.take(1), heap.take(1)] == [0, PAGE_BYTES]


def test_a_full_file_system_is_no_room(monkeypatch: pytest.MonkeyPatch, descriptor: int) -> None:
    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    heap = Heap(descriptor, ROOM)
    assert heap.take(10) == 0
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        assert heap.take(10) is None
        heap.give_back(0, 10)
        assert heap.take(10) == 0, "what was taken before is there"
    assert heap.take(10) == PAGE_BYTES


def test_a_finaliser_may_run_inside_of_take(
    monkeypatch: pytest.MonkeyPatch, descriptor: int
) -> None:
    """The collector runs when it likes, with the heap's lock held by this very thread."""

    class Holder:
        pass

    heap = Heap(descriptor, ROOM)
    start = heap.take(PAGE_BYTES)
    assert start == 0
    holder = Holder()
    weakref.finalize(holder, heap.give_back, start, PAGE_BYTES)
    allocate = os.posix_fallocate

    def collects(*words: int) -> None:
        nonlocal holder
        del holder
        gc.collect()
        allocate(*words)

    monkeypatch.setattr(os, "posix_fallocate", collects)
    got: list[int | None] = []
    thread = threading.Thread(target=lambda: got.append(heap.take(PAGE_BYTES)), daemon=True)
    thread.start()
    thread.join(10)
    assert got == [PAGE_BYTES], "it stands still"
    monkeypatch.undo()
    assert heap.take(PAGE_BYTES) == 0


def test_threads_never_get_the_same_page(descriptor: int) -> None:
    heap, rounds = Heap(descriptor, 1 << 26), 300
    held: list[set[int]] = [set() for _ in range(4)]
    clashes: list[int] = []
    owner: dict[int, int] = {}

    def work(number: int) -> None:
        for turn in range(rounds):
            start = heap.take((turn % 3 + 1) * PAGE_BYTES)
            assert start is not None
            if owner.setdefault(start, number) != number:
                clashes.append(start)
            held[number].add(start)
            if turn % 2:
                start = held[number].pop()
                del owner[start]
                # The size is not known here any more: one page is given back, and is enough.
                heap.give_back(start, PAGE_BYTES)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not clashes
