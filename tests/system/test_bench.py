"""The bench measures every algorithm beside the library's own and gloo, and sees what is wrong."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest
import torch

from harness import ROOT, run_ranks
from mpmp import commands
from mpmp.errors import ConfigError, InputOutputError
from mpmp.job.bench.collectives import oracle, outputs
from mpmp.job.bench.collectives.bound import Bound
from mpmp.job.bench.collectives.rows import BUS, Row
from mpmp.job.bench.collectives.settings import Collectives, read_size, size_name
from mpmp.job.bench.collectives.tables import figures, shares
from mpmp.programs.collectives import COLLECTIVES
from mpmp.programs.tuning import Table, from_json
from system.small import HOME

BENCH = ["-m", "mpmp.bench", "collectives"]
QUICK = ["--repeats", "2", "--seconds", "0.05"]
ENV = {"PYTHONPATH": str(ROOT), **HOME}


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.mark.mpich_too
def test_every_algorithm_is_timed_beside_native_and_gloo(tmp_path: Path) -> None:
    files = {name: tmp_path / f"rows.{name}" for name in ("csv", "png", "table")}
    flags = [word for name, path in files.items() for word in (f"--{name}", str(path))]
    sizes = ["--sizes", "64,1KiB", "--against", "native,gloo", "--bound"]
    done = run_ranks(2, [*BENCH, *sizes, *QUICK, *flags], env=ENV, timeout=200)
    assert done.rc == 0 and done.left_behind == 0, done.text

    rows = read_rows(files["csv"])
    found = {(row["collective"], row["algorithm"], int(row["bytes"])) for row in rows}
    assert found == {
        (collective, name, nbytes)
        for collective, algorithms in COLLECTIVES.items()
        for name in ("native", "gloo", "auto", *algorithms)
        for nbytes in ((0,) if collective == "barrier" else (64, 1024))
    }
    for row in rows:
        assert list(row) == list(Row.__annotations__)
        assert row["wrong"] == "0" and float(row["time_us"]) > 0, row
        bus = BUS[row["collective"]](2) * float(row["algbw_GBps"])
        assert float(row["busbw_GBps"]) == pytest.approx(bus)
    assert files["png"].read_bytes().startswith(b"\x89PNG")

    table = from_json(files["table"].read_text())
    assert {(entry.collective, entry.algorithm) for entry in table.entries} == {
        (collective, name) for collective, algorithms in COLLECTIVES.items() for name in algorithms
    }
    assert table.links.same_host is not None
    for said in ("x native", "x gloo", "automatic choice", "alpha", "simulated", "of the bound"):
        assert said in done.stdout, said


def test_the_written_table_is_what_auto_chooses_by(tmp_path: Path) -> None:
    path, few = tmp_path / "table.json", ["--collectives", "broadcast", "--sizes", "4KiB", *QUICK]
    done = run_ranks(2, [*BENCH, *few, "--table", str(path)], env=ENV)
    assert done.rc == 0, done.text
    found = json.loads(path.read_text())
    for entry in found["entries"]:  # now the slowest is the fastest
        entry["time_us"] = 1.0 if entry["algorithm"] == "scatter_allgather" else 9.0
    path.write_text(json.dumps(found))
    again = [*BENCH, *few, "--comm.table", str(path), "--algorithms", "auto", "--comm.explain"]
    done = run_ranks(2, again, env=ENV)
    assert done.rc == 0 and "scatter_allgather took 1.0 us" in done.stderr, done.text
    assert [line for line in done.stdout.splitlines() if "4 KiB  scatter_allgather" in line]


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("int32", marks=pytest.mark.slow)])
def test_other_types_and_ordinary_memory_on_three_ranks(tmp_path: Path, dtype: str) -> None:
    path = tmp_path / "rows.csv"
    flags = ["--dtype", dtype, "--placement", "ordinary", "--against", "native,gloo"]
    few = ["--sizes", "40,5000", "--collectives", "allreduce,reduce_scatter,alltoall"]
    done = run_ranks(3, [*BENCH, *few, *QUICK, *flags, "--csv", str(path)], env=ENV, timeout=120)
    assert done.rc == 0, done.text
    rows = read_rows(path)
    assert {row["wrong"] for row in rows} == {"0"}
    # MPI knows no bfloat16; gloo does.
    expected = {"auto", "gloo"} | ({"native"} if dtype == "int32" else set())
    assert expected == {row["algorithm"] for row in rows} & {"auto", "gloo", "native"}


def test_a_wrong_algorithm_ends_with_1_and_is_marked(tmp_path: Path) -> None:
    script = tmp_path / "planted.py"
    script.write_text(
        "from dataclasses import replace\n"
        "from itertools import islice\n"
        "from mpmp import bench\n"
        "from mpmp.programs.collectives import COLLECTIVES\n"
        "ring = COLLECTIVES['allreduce']['ring']\n"
        "short = lambda rank, size: islice(ring.program(rank, size), size - 1)\n"
        "COLLECTIVES['allreduce']['ring'] = replace(ring, program=short)\n"
        "bench.main()\n"
    )
    few = ["--collectives", "allreduce", "--algorithms", "ring,auto", "--sizes", "4KiB", *QUICK]
    done = run_ranks(2, [script, "collectives", *few], env=ENV)
    marked = [line.split() for line in done.stdout.splitlines() if "WRONG" in line]
    assert done.rc == 1 and [words[:2] for words in marked] == [["ring", "WRONG"]], done.text
    assert "1 of 3 rows have wrong elements, the first is allreduce ring of 4 KiB" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "must be told what to measure"),
        (["collectives", "--against", "glo"], 'did you mean "gloo"'),
    ],
)
def test_bad_arguments_end_with_one_line(arguments: list[str], sentence: str) -> None:
    done = run_ranks(2, ["-m", "mpmp.bench", *arguments], env=ENV)
    first = done.stderr.splitlines()[0]
    assert done.rc == 2 and re.match(r"\[rank ./2 ", first) and sentence in first, done.text


@pytest.mark.parametrize("arguments", [["--help"], ["collectives", "--help"]])
def test_help_is_answered_once(arguments: list[str]) -> None:
    done = run_ranks(2, ["-m", "mpmp.bench", *arguments], env=ENV)
    assert done.rc == 0 and done.stdout.count("very algorithm of every collective") == 1, done.text


def test_a_file_that_cannot_be_written_is_refused_before_measuring(tmp_path: Path) -> None:
    done = run_ranks(2, [*BENCH, "--csv", str(tmp_path / "no" / "rows.csv")], env=ENV)
    assert done.rc == 74 and "is no folder to write to" in done.stderr, done.text
    assert "contenders" not in done.stdout


# --- in one process -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--repeats", "0"], "at least one repeat"),
        (["--seconds", "nan"], "seconds must be positive"),
        (["--sizes", "3XB"], "size '3XB' is not understood"),
        (["--sizes", ","], "a list of names"),
        (["--smallest", "1MiB", "--largest", "1KiB"], "must not exceed largest"),
        (["--factor", "1"], "must be at least 2"),
        (["--algorithms", "rings"], 'did you mean "ring"'),
        (["--algorithms", "bruck", "--collectives", "broadcast"], "these collectives"),
        (["--collectives", "allreduces"], 'did you mean "allreduce"'),
        (["--collectives", "barrier", "--bound"], "--bound speaks of the allreduce"),
        (["--placement", "there"], "invalid choice 'there'"),
        (["--comm.timeout_s", "0"], "comm.timeout_s must be positive"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        commands.cli(Collectives, "bench", "", arguments, Collectives())


@pytest.mark.parametrize(
    ("settings", "kind", "sentence"),
    [
        ({"png": "no/rows.png"}, InputOutputError, "is no folder to write to"),
        ({"png": "rows.xyz"}, ConfigError, "must end with a format"),
        ({"table": "theirs.json"}, ConfigError, "keep one table a library"),
        ({"table": "rows.csv"}, ConfigError, "is there already, and"),
        ({"table": "a.folder"}, InputOutputError, "it is a folder"),
        ({"csv": "a.folder"}, InputOutputError, "it is a folder"),
    ],
)
def test_what_could_not_be_written_is_refused(
    settings: dict[str, str],
    kind: type[Exception],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("theirs.json").write_text(Table("another MPI 1.0").to_json())
    Path("rows.csv").write_text("collective,algorithm\n")
    Path("a.folder").mkdir()
    with pytest.raises(kind, match=sentence):
        outputs.require(Collectives(**settings), "Open MPI 5.0.11")  # type: ignore[arg-type]


def test_a_table_is_added_to_what_the_file_holds(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    for ranks in (2, 4):
        rows = [
            Row.of("allreduce", name, "float32", ranks, 1024, seconds, wrong)
            for name, seconds, wrong in (("ring", 2e-6, 0), ("auto", 1e-6, 0), ("swing", 1e-6, 3))
        ]
        outputs.write(Collectives(table=str(path)), rows, None, "MPI 1", 1, "window")
    found = [(one.ranks, one.algorithm, one.time_us) for one in from_json(path.read_text()).entries]
    assert found == [(2, "ring", pytest.approx(2)), (4, "ring", pytest.approx(2))]


def test_sizes_are_read_and_told() -> None:
    sizes = {"64": 64, "16KiB": 16384, "0.5MiB": 524288, "1 GiB": 1 << 30}
    assert {text: read_size(text) for text in sizes} == sizes
    assert [size_name(nbytes) for nbytes in (0, 64, 1536, 1 << 20)] == [
        "0 B", "64 B", "1,536 B", "1 MiB",
    ]  # fmt: skip
    for text in ("", "0", "1.3", "-4", "1e3", "5TiB", "1000000000000000"):
        with pytest.raises(ConfigError):
            read_size(text)
    assert Collectives(smallest="1KiB", largest="20KiB").lengths == [1024, 4096, 16384]


def test_an_algorithm_is_timed_where_it_exists() -> None:
    settings = Collectives(algorithms="bruck,auto")
    assert settings.algorithms_of("allgather") == ["bruck", "auto"]
    assert settings.algorithms_of("broadcast") == ["auto"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int32])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_the_oracle_says_what_collectives_mean(size: int, dtype: torch.dtype) -> None:
    def of(collective: str, what: str) -> list[torch.Tensor]:
        length = oracle.num_elements(collective, 3000, size, 2)
        function = getattr(oracle, what)
        return [function(collective, rank, size, length, dtype) for rank in range(size)]

    total = torch.stack(of("allreduce", "given")).double().sum(0).to(dtype)
    assert all(torch.equal(one, total) for one in of("allreduce", "expected"))
    pieces = torch.stack(of("reduce_scatter", "given")).double().sum(0).to(dtype).chunk(size)
    for found, right in zip(of("reduce_scatter", "expected"), pieces, strict=True):
        assert torch.equal(found, right)
    joined = torch.cat(of("allgather", "given"))
    assert all(torch.equal(one, joined) for one in of("allgather", "expected"))
    crossed = [torch.stack(one.chunk(size)) for one in of("alltoall", "given")]
    for rank, right in enumerate(of("alltoall", "expected")):
        assert torch.equal(torch.cat([one[rank] for one in crossed]), right)


def test_wrong_elements_are_counted() -> None:
    right = torch.arange(6.0)
    assert oracle.num_wrong(right.clone(), right) == 0
    assert oracle.num_wrong(right * torch.tensor([1, 1, 2, 1, 1, torch.nan]), right) == 2
    assert oracle.num_wrong(right[:5], right) == 6
    assert oracle.num_wrong(None, right) == 6
    assert oracle.num_wrong(right, None) == 0


def test_the_table_of_figures_compares() -> None:
    times = {"native": 8e-6, "gloo": 80e-6, "ring": 4e-6}
    rows = [
        Row.of("allreduce", name, "float32", 4, 1024, seconds, int(name == "ring"))
        for name, seconds in times.items()
    ]
    lines = [line.split() for line in figures(rows).splitlines()]
    assert lines[4] == ["ring", "WRONG", "1", "4.0", "0.256", "0.384", "2.00", "20.00"]
    bound = Bound(1024, 4, 3e-6)
    assert bound.bandwidth == pytest.approx(2 * 1024 * 4 / 3e3)
    assert "75 %" in shares(bound, rows)
