"""Started operations side by side: what may overlap, in which order, and how errors come out."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

from mpmp.comm.progress import LANES, Course, Progress
from mpmp.errors import PeerError


def until(ready: Callable[[], bool], *_: object, nap: object) -> float:
    for _turn in range(1_000_000):
        if ready():
            return 0.0
    raise PeerError("nothing moves any more")


class Awaited:
    """Something that arrives when somebody says so."""

    def __init__(self) -> None:
        self.there = False

    def arrived(self) -> bool:
        return self.there

    def wait(self, *, background: bool = False) -> None:
        assert self.there

    def describe(self) -> str:
        return "a word"

    def missing(self) -> Iterator[int]:
        yield 1


@pytest.fixture(params=[True, False], ids=["threaded", "by whoever waits"])
def progress(request):
    found = Progress(until, request.param)
    yield found
    found.stop()


def needs(first: Awaited, said: list[str], name: str, then: Awaited | None = None) -> Course:
    said.append(f"{name} begins")
    if then is not None:
        then.there = True
    yield first
    said.append(f"{name} ends")


def test_one_operation_goes_on_while_another_waits(progress):
    """One after the other they would wait for ever: the first needs what the second does."""
    said: list[str] = []
    word, told = Awaited(), Awaited()
    told.there = True
    first = progress.drive(needs(word, said, "first"), lane=0)
    second = progress.drive(needs(told, said, "second", then=word), lane=1)
    first.wait()
    second.wait()
    assert said.index("second begins") < said.index("first ends")


def test_operations_of_one_lane_follow_one_another(progress):
    said: list[str] = []
    word = Awaited()
    word.there = True
    handles = [progress.drive(needs(word, said, str(n)), lane="one") for n in range(3)]
    for handle in reversed(handles):
        handle.wait()
    assert said == [f"{n} {what}" for n in range(3) for what in ("begins", "ends")]


def test_a_free_lane_passes_those_that_wait_and_nothing_passes_what_has_no_lane():
    """A layer's sum would else stand behind all buckets of gradients."""
    progress = Progress(until, threaded=False)
    said: list[str] = []
    never, told = Awaited(), Awaited()
    told.there = True
    buckets = [progress.drive(needs(never, said, f"bucket {n}"), lane="data") for n in range(3)]
    progress.drive(needs(told, said, "layer"), lane="tensor").wait()
    assert said == ["bucket 0 begins", "layer begins", "layer ends"]
    alone = progress.start(lambda: said.append(f"alone of {len(progress._under_way)}"))
    behind = progress.drive(needs(told, said, "behind"), lane="tensor")
    never.there = True
    for handle in (behind, alone, *buckets):
        handle.wait()
    assert said[-3:] == ["alone of 1", "behind begins", "behind ends"]


def test_an_error_ends_its_own_operation_and_is_seen_inside_of_it(progress):
    seen: list[BaseException] = []
    good, bad = Awaited(), Awaited()
    good.there = True

    def refused() -> bool:
        raise PeerError("planted")

    bad.arrived = refused  # type: ignore[method-assign]

    def course() -> Course:
        try:
            yield bad
        except PeerError as error:
            seen.append(error)
            raise

    broken = progress.drive(course(), lane=0)
    whole = progress.drive(needs(good, [], "whole"), lane=1)
    whole.wait()
    with pytest.raises(PeerError, match="planted"):
        broken.wait()
    assert len(seen) == 1


def test_where_nothing_moves_any_more_all_that_is_under_way_fails():
    progress = Progress(until, threaded=False)
    handles = [progress.drive(needs(Awaited(), [], "never"), lane) for lane in range(LANES)]
    for handle in handles:
        with pytest.raises(PeerError, match="nothing moves"):
            handle.wait()


def test_many_started_from_several_threads_all_end(progress):
    word = Awaited()
    word.there = True
    said: list[str] = []

    def start() -> None:
        for handle in [progress.drive(needs(word, said, "x"), lane=n % 3) for n in range(50)]:
            if progress.threaded:
                handle.wait()

    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    progress.start(lambda: None).wait()
    assert said.count("x ends") == 200
