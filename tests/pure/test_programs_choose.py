"""By the table, by the fitted links, by thresholds; and the table's file, read strictly."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpmp.errors import ConfigError
from mpmp.programs.choose import choose
from mpmp.programs.cluster import Link, Links, Memory
from mpmp.programs.collectives import COLLECTIVES, find
from mpmp.programs.predict import crossover, predict
from mpmp.programs.tuning import PLACEMENTS, Entry, Table, from_json
from mpmp.programs.windows import WindowAlgorithm

KIB = 1024


def entry(algorithm: str, nbytes: int, time_us: float, **changes: Any) -> Entry:
    usual = Entry("allreduce", 4, 1, nbytes, algorithm, time_us, "ordinary")
    return replace(usual, **changes)


# --- by measurement -----------------------------------------------------------------------------

MEASURED = Table(
    "Open MPI 5.0.11",
    (
        entry("recursive_doubling", 1024, 5.0),
        entry("ring", 1024, 9.5),
        entry("recursive_doubling", 65536, 90.0),
        entry("ring", 65536, 60.25),
        entry("swing", 65536, 60.5),
    ),
)


@pytest.mark.parametrize(
    ("nbytes", "algorithm"),
    [
        (0, "recursive_doubling"),
        (1, "recursive_doubling"),
        (1024, "recursive_doubling"),
        (8191, "recursive_doubling"),  # 8192 is 8 times 1024 and an eighth of 65,536
        (8193, "ring"),
        (65536, "ring"),
        (1 << 40, "ring"),
    ],
)
def test_the_nearest_measured_length_decides(nbytes: int, algorithm: str) -> None:
    assert choose("allreduce", 4, nbytes, table=MEASURED).algorithm == algorithm


def test_the_reason_tells_the_times() -> None:
    assert choose("allreduce", 4, 100_000, table=MEASURED).reason == (
        "measured: at 65,536 bytes, the length nearest to 100,000, ring took 60.2 us and swing "
        "60.5 us on 4 ranks of 1 host"
    )


@pytest.mark.parametrize(("size", "hosts"), [(3, 1), (5, 1), (4, 2), (4, 4)])
def test_a_group_that_was_not_measured_has_the_defaults(size: int, hosts: int) -> None:
    found = choose("allreduce", size, 1024, hosts=hosts, table=MEASURED)
    assert found == choose("allreduce", size, 1024, hosts=hosts)
    assert found.reason.startswith("built-in default: ")


def test_hosts_may_be_one_number_for_each_rank() -> None:
    for hosts in ((0, 0, 0, 0), [7, 7, 7, 7]):
        assert choose("allreduce", 4, 9, hosts=hosts, table=MEASURED).reason.startswith("measured")
    assert choose("allreduce", 4, 1 << 20, hosts=(0, 0, 1, 1)).algorithm == "hierarchical"


def test_only_what_can_be_used_is_taken_from_the_table() -> None:
    """The window was fastest, and without windows it counts for nothing."""
    table = replace(
        MEASURED,
        entries=(
            *MEASURED.entries,
            entry("window", 1024, 1.0, placement="window"),
            entry("ring", 1024, 0.5, placement="window"),
            entry("window", 1024, 2.0),
            entry("direct", 1024, 30.0),
        ),
    )
    assert choose("allreduce", 4, 1024, table=table).algorithm == "recursive_doubling"
    assert choose("allreduce", 4, 1024, table=table, order="fixed").algorithm == "direct"
    # Where tensors lie in windows, what was measured there counts.
    assert choose("allreduce", 4, 1024, table=table, shared=True).algorithm == "ring"
    fixed = choose("allreduce", 4, 1024, table=table, shared=True, order="fixed")
    assert fixed.algorithm == "window"


# --- by prediction ------------------------------------------------------------------------------

LAB = Table(
    "MPICH 5.0.2",
    links=Links(Link(1e-6, 2e-10, 1e-10), Link(1e-3, 5e-8, 1e-10), Memory(1e-6, 1e-10)),
)


@pytest.mark.parametrize("collective", COLLECTIVES)
@pytest.mark.parametrize(("size", "hosts"), [(4, 1), (4, 4), (8, 4)])
def test_the_links_foretell_the_fastest(collective: str, size: int, hosts: int) -> None:
    for nbytes in (64, 1 << 22):
        found = choose(collective, size, nbytes, hosts=hosts, table=LAB)
        times = {
            name: predict(LAB.links, collective, name, size, nbytes, hosts)
            for name, algorithm in COLLECTIVES[collective].items()
            if not isinstance(algorithm, WindowAlgorithm)
        }
        assert times[found.algorithm] == pytest.approx(min(times.values()), rel=1e-9, abs=0)
        assert found.reason.startswith(f"predicted from the fitted links for {nbytes:,} bytes")


def test_predictions_change_at_the_crossover() -> None:
    links = Links(other_host=Link(1e-3, 5e-8, 1e-10))
    table, pair = replace(LAB, links=links), ("recursive_doubling", "rabenseifner")
    at = crossover(links, "allreduce", *pair, 4, hosts=4)
    assert at is not None
    names = [
        choose("allreduce", 4, nbytes, hosts=4, table=table).algorithm
        for nbytes in (at // 4, 9 * at)
    ]
    times = [
        [predict(links, "allreduce", name, 4, nbytes, 4) for name in pair]
        for nbytes in (at // 2, 2 * at)
    ]
    assert times[0][0] < times[0][1] and times[1][0] > times[1][1]
    assert names[0] != names[1]


def test_links_that_do_not_tell_all_tell_nothing() -> None:
    """Of windows nothing is known: they may be the fastest."""
    table = replace(LAB, links=replace(LAB.links, memory=None))
    found = choose("allreduce", 4, 1 << 20, shared=True, table=table)
    assert (found.algorithm, found.reason[:8]) == ("window", "built-in")
    assert choose("allreduce", 4, 1 << 20, table=table).reason.startswith("predicted")
    huge = choose("allreduce", 16384, 1 << 20, hosts=1024, table=LAB)
    assert huge.reason.startswith("built-in"), "thousands of ranks are not followed at every call"


# --- by default ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("collective", "size", "nbytes", "known", "algorithm"),
    [
        ("allreduce", 4, 2048, {}, "recursive_doubling"),
        ("allreduce", 4, 2049, {}, "rabenseifner"),
        ("allreduce", 8, 2048, {"hosts": 4}, "recursive_doubling"),
        ("allreduce", 8, 2049, {"hosts": 4}, "hierarchical"),
        ("allreduce", 4, 2049, {"hosts": 4}, "rabenseifner"),
        ("allreduce", 4, 256 * KIB - 1, {"hosts": 4}, "rabenseifner"),
        ("allreduce", 4, 256 * KIB, {"hosts": 4}, "ring"),
        ("allreduce", 5, 256 * KIB, {"hosts": 5}, "rabenseifner"),
        ("allreduce", 4, 256 * KIB, {"hosts": 2}, "hierarchical"),
        ("allreduce", 4, KIB, {"shared": True}, "one_shot"),
        ("allreduce", 4, KIB + 1, {"shared": True}, "window"),
        ("allreduce", 2, 2 * KIB, {"shared": True, "order": "fixed"}, "one_shot"),
        ("allreduce", 4, 1 << 20, {"shared": True, "order": "fixed"}, "window"),
        ("allreduce", 4, 8, {"order": "fixed"}, "direct"),
        ("reduce_scatter", 4, 512 * KIB, {}, "recursive_halving"),
        ("reduce_scatter", 4, 512 * KIB + 1, {}, "pairwise"),
        ("reduce_scatter", 4, 8, {"order": "fixed"}, "direct"),
        ("reduce_scatter", 4, 8, {"shared": True}, "window"),
        ("allgather", 4, 512 * KIB - 1, {}, "recursive_doubling"),
        ("allgather", 4, 512 * KIB, {"order": "fixed"}, "ring"),
        ("allgather", 3, 80 * KIB, {}, "bruck"),
        ("allgather", 3, 80 * KIB + 1, {}, "ring"),
        ("allgather", 3, 8, {"shared": True}, "window"),
        ("broadcast", 8, 1 << 30, {}, "binomial"),
        ("broadcast", 9, 12 * KIB - 1, {}, "binomial"),
        ("broadcast", 9, 12 * KIB, {}, "scatter_allgather"),
        ("broadcast", 9, 12 * KIB, {"shared": True}, "window"),
        ("reduce", 9, 1 << 20, {"shared": True}, "binomial"),
        ("gather", 9, 1 << 20, {}, "binomial"),
        ("scatter", 9, 1 << 20, {}, "binomial"),
        ("alltoall", 8, 8 * 255, {}, "bruck"),
        ("alltoall", 8, 8 * 256, {}, "pairwise"),
        ("alltoall", 7, 7, {}, "pairwise"),
        ("alltoall", 8, 8, {"even": False}, "pairwise"),
        ("barrier", 3, 1, {}, "dissemination"),
        ("barrier", 3, 1, {"shared": True}, "window"),
    ],
)
def test_defaults(
    collective: str, size: int, nbytes: int, known: dict[str, Any], algorithm: str
) -> None:
    found = choose(collective, size, nbytes, **known)
    assert found.algorithm == algorithm
    assert found.reason.startswith("built-in default: ")


@given(
    st.sampled_from(sorted(COLLECTIVES)),
    st.integers(1, 40),
    st.integers(0, 1 << 31),
    st.integers(1, 40),
    st.booleans(),
    st.sampled_from(["any", "fixed"]),
    st.booleans(),
)
def test_every_choice_is_an_algorithm_that_can_be_used(
    collective: str, size: int, nbytes: int, hosts: int, shared: bool, order: str, even: bool
) -> None:
    if (collective, order) == ("reduce", "fixed"):
        return
    hosts = min(hosts, size)
    shared = shared and hosts == 1
    found = choose(collective, size, nbytes, hosts=hosts, shared=shared, order=order, even=even)
    algorithm = find(collective, found.algorithm)
    assert shared or not isinstance(algorithm, WindowAlgorithm)
    if order == "fixed" and collective in ("allreduce", "reduce_scatter"):
        assert algorithm.fixed_order


def test_a_choice_that_cannot_be_made_is_refused() -> None:
    with pytest.raises(ConfigError, match="no reduce algorithm sums in rank order; ask allreduce"):
        choose("reduce", 4, 8, order="fixed")
    with pytest.raises(ConfigError, match='did you mean "allreduce"'):
        choose("all_reduce", 4, 8)


# --- the file -----------------------------------------------------------------------------------

FULL = replace(MEASURED, links=replace(LAB.links, other_host=None))


def test_a_table_comes_back_from_its_text() -> None:
    for table in (FULL, MEASURED, LAB, Table("none")):
        assert from_json(table.to_json()) == table
    text = FULL.to_json()
    assert len(text.splitlines()) > len(FULL.entries)
    assert text.count('"recursive_doubling"') == 2, "an entry a line"


def changed(change: dict[str, Any], at: str = "") -> str:
    """The text of the full table with some values changed; None takes them out."""
    table = json.loads(FULL.to_json())
    place = {"": table, "entry": table["entries"][3], "link": table["links"]["same_host"]}[at]
    for name, value in change.items():
        place[name] = value
        if value is None:
            del place[name]
    return json.dumps(table)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "must be JSON"),
        ("\x80\x04K\x01.", "must be JSON"),
        ("[" * 100_000, "must be JSON"),
        ("[]", 'is a JSON object with a "format"'),
        ("{}", 'is a JSON object with a "format"'),
        (changed({"format": 2}), "has format 2 and this program reads 1"),
        (changed({"format": True}), "has format True and this program reads 1"),
        (changed({"library": None}), 'a tuning table has no "library"'),
        (changed({"host": 1}), 'a tuning table has the unknown "host"'),
        (changed({"library": 3}), 'a text as "library"'),
        (changed({"entries": {}}), 'a list as "entries"'),
        (changed({"links": {}}), 'links has no "memory"; it needs same_host, other_host, memory'),
        (changed({"alpha_s": None}, "link"), 'same_host has no "alpha_s"'),
        (changed({"alpha_s": "1"}, "link"), "same_host of the tuning table needs finite numbers"),
        (changed({"alpha_s": -1}, "link"), "Link needs alpha_s finite and not negative, not -1"),
        (changed({"time_us": float("nan")}, "entry"), "must be JSON: it has NaN where a number"),
        (changed({"time_us": float("inf")}, "entry"), "must be JSON: it has Infinity where"),
        (changed({"time_us": 5.25}, "entry").replace("5.25", "1e999"), "finite time_us .*not inf"),
        (changed({"time_us": 0}, "entry"), "entry 3 of .*: .* finite time_us above 0, not 0"),
        (changed({"time_us": "9"}, "entry"), "finite time_us above 0, not '9'"),
        (changed({"time_us": None}, "entry"), 'entry 3 of the tuning table: it has no "time_us"'),
        (changed({"bytes": -1}, "entry"), "bytes of at least 0, not -1"),
        (changed({"bytes": 1.0}, "entry"), "bytes of at least 0, not 1.0"),
        (changed({"ranks": True}, "entry"), "ranks of at least 1, not True"),
        (changed({"hosts": 5}, "entry"), "an entry has 4 ranks on 5 hosts"),
        (
            changed({"algorithm": "rign"}, "entry"),
            'no allreduce algorithm "rign"; did you mean "ring"',
        ),
        (changed({"algorithm": "native"}, "entry"), 'entry 3 .* no allreduce algorithm "native"'),
        (changed({"algorithm": []}, "entry"), "entry 3 of the tuning table: "),
        (changed({"collective": "alreduce"}, "entry"), 'did you mean "allreduce"'),
        (
            changed({"placement": "windows"}, "entry"),
            'no placement "windows"; did you mean "window"',
        ),
        (
            changed({"bytes": 1024}, "entry"),
            "two times of allreduce ring with 1024 bytes on 4 ranks",
        ),
        (changed({"entries": [3]}), "entry 0 of the tuning table: it must be an object with"),
    ],
)
def test_what_is_not_understood_is_refused(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as refused:
        from_json(text)
    assert "\n" not in str(refused.value)


def test_newer_times_and_links_take_the_place_of_older_ones() -> None:
    newer = Table(
        MEASURED.library,
        (entry("ring", 1024, 3.0), entry("ring", 1024, 4.0, placement="window")),
        Links(other_host=Link(1e-3, 5e-8)),
    )
    merged = FULL.merge(newer)
    assert len(merged.entries) == len(FULL.entries) + 1
    assert choose("allreduce", 4, 1024, table=merged).algorithm == "ring"
    assert merged.links == replace(FULL.links, other_host=Link(1e-3, 5e-8))
    assert merged.merge(newer) == merged
    with pytest.raises(ConfigError, match='of "Open MPI 5.0.11" cannot take times of "MPICH'):
        FULL.merge(LAB)


@given(st.lists(st.integers(0, 1 << 40), unique=True), st.sampled_from(PLACEMENTS))
def test_any_lengths_come_back(lengths: list[int], placement: str) -> None:
    made = tuple(entry("ring", n, 0.1 + n / 7, placement=placement) for n in lengths)
    table = Table('x\n"é', made)
    assert from_json(table.to_json()) == table
    assert re.search(r"\n$", table.to_json())
