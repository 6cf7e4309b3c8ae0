"""pytest plugin: tests of ranks.

    @pytest.mark.ranks(2, 3, timeout=20)       # sizes; without any 1, 2, 3, 4; seconds, else 60
    def test_sum(world):
        ...

A test in a folder named ``ranks``, or with the marker, becomes one item a size:
``test_sum[ranks2]`` is the one of two ranks (-k ranks2 chooses all of two; the fixture
``num_ranks`` is the size). In plain pytest one mpirun a size runs them all and the items report
what its ranks found (session.py). Under an mpirun of yours, with --with-mpi, they run right here
(ranks.py), those of other sizes skipped.

``slow`` tests are left out unless --all or an expression with ``slow`` is given, or the test is
named. A rank test skipped at every size is an error, except for reasons that begin with one of
``EXCUSES``.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import pytest

from harness.ranks import RankPlugin, timeout_of
from harness.session import RankSession

SIZES = (1, 2, 3, 4)
EXCUSES = ("needs a GPU", "needs root", "optional data")

_SIZE = "num_ranks"
_ranks = pytest.StashKey[RankPlugin]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("ranks")
    group.addoption("--all", action="store_true", help="run the tests marked slow, too")
    group.addoption("--rank-reports", metavar="DIR", help="(set by the parent of rank tests)")
    parser.addini("rank_start", "what starts MPI on a rank, as module:callable", default="")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    for line in (
        "ranks(*sizes, timeout=60): a test of ranks at these sizes (else 1 to 4), with its limit",
        "slow: left out unless --all is given",
        "mpich_too: a system test that make test runs on MPICH as well",
    ):
        config.addinivalue_line("markers", line)
    if config.getoption("--with-mpi", False):
        folder = config.getoption("--rank-reports")
        plugin = RankPlugin(config.getini("rank_start"), Path(folder) if folder else None)
        config.stash[_ranks] = plugin
        config.pluginmanager.register(plugin)
    else:
        config.pluginmanager.register(ParentPlugin(config))


@pytest.fixture
def num_ranks() -> int:
    raise RuntimeError("num_ranks is given to rank tests only")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    sizes = _sizes(metafunc.definition)
    if not sizes:
        return
    plugin = metafunc.config.stash.get(_ranks, None)
    if plugin is None:
        params = [_param(n) for n in sizes]
    elif plugin.size in sizes:
        params = [_param(plugin.size)]
    else:
        skip = pytest.mark.skip(reason=f"for {sizes} ranks, not {plugin.size}")
        params = [_param(plugin.size, skip)]
    if _SIZE not in metafunc.fixturenames:
        metafunc.fixturenames.append(_SIZE)
    metafunc.parametrize(_SIZE, params)


def _param(n: int, *marks: pytest.MarkDecorator) -> object:
    return pytest.param(n, marks=marks, id=f"ranks{n}")


def _sizes(item: pytest.Item) -> tuple[int, ...]:
    """Sizes of a rank test; none for other tests."""
    mark = item.get_closest_marker("ranks")
    if mark is None:
        folders = item.nodeid.split("::")[0].split("/")[:-1]
        return SIZES if "ranks" in folders else ()
    return tuple(mark.args) or SIZES


def _size(item: pytest.Item) -> int:
    """Ranks an item runs on; 0 for an item that is no rank test."""
    if isinstance(item, pytest.Function) and hasattr(item, "callspec") and _sizes(item):
        return int(str(item.callspec.params[_SIZE]))
    return 0


def pytest_itemcollected(item: pytest.Item) -> None:
    if _size(item) and item.get_closest_marker("ranks") is None:
        item.add_marker("ranks")  # so that -m ranks finds those of the folder


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    named = any("::" in arg for arg in config.args)
    want_slow = config.getoption("--all") or named or "slow" in config.getoption("-m")
    on_ranks = _ranks in config.stash
    kept: list[pytest.Item] = []
    left_out: list[pytest.Item] = []
    for item in items:
        slow = item.get_closest_marker("slow") is not None
        keep = (want_slow or not slow) and (bool(_size(item)) or not on_ranks)
        (kept if keep else left_out).append(item)
    # By size, so that the ranks of one size are started once and gone before the next are.
    items[:] = sorted(kept, key=_size)
    config.hook.pytest_deselected(items=left_out)
    for item in items:
        if _size(item):
            item.add_marker(pytest.mark.timeout(0))  # limits of rank tests are ours


class ParentPlugin:
    """Plain pytest: rank tests run in an mpirun, and their items here show what came of them."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.sessions: dict[int, RankSession] = {}
        self.skips: dict[str, str] = {}
        self.families: dict[str, list[str]] = {}
        self.num_sizes: dict[str, int] = {}
        self.last: dict[str, int] = {}
        self.errors: list[str] = []

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        tests: dict[int, dict[str, float]] = {}
        for item in session.items:
            n = _size(item)
            if n:
                tests.setdefault(n, {})[item.nodeid] = timeout_of(item)
                family = re.sub(r"(?<=[\[-])ranks\d+-?", "", item.nodeid)
                self.families.setdefault(family, []).append(item.nodeid)
                self.num_sizes[family] = len(_sizes(item))
                item.setup = _nothing  # type: ignore[method-assign]  # fixtures are for the ranks
                item.runtest = partial(self.show, item, n)  # type: ignore[method-assign]
        self.last = {list(selected)[-1]: n for n, selected in tests.items()}
        config = self.config
        args = ["--rootdir", str(config.rootpath), "-p", "no:cacheprovider", "--all"]
        args += ["--tb", config.getoption("tbstyle")]
        if config.inipath is not None:
            args += ["-c", str(config.inipath)]
        for n, selected in tests.items():
            self.sessions[n] = RankSession(n, selected, args, config.rootpath)

    def show(self, item: pytest.Item, n: int) -> None:
        kind, text = self.sessions[n].outcome(item.nodeid)
        if kind == "failed":
            pytest.fail(text, pytrace=False)
        elif kind == "skipped":
            pytest.skip(text.removeprefix("Skipped: "))
        elif kind == "xfailed":
            pytest.xfail(text)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        n = self.last.get(nodeid)
        if n is not None:
            self.errors += self.sessions[n].finish()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped and not hasattr(report, "wasxfail"):
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else ""
            self.skips[report.nodeid] = reason.removeprefix("Skipped: ")

    def skipped_everywhere(self) -> list[str]:
        """One line for each rank test that was selected at all its sizes and ran at none."""
        lines = []
        for family, tests in self.families.items():
            reasons = [self.skips[test] for test in tests if test in self.skips]
            excused = any(reason.startswith(EXCUSES) for reason in reasons)
            if len(reasons) == self.num_sizes[family] and not excused:
                lines.append(f"{family} was skipped at every number of ranks: {reasons[0]}")
        return lines

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        for ranks in self.sessions.values():
            ranks.close()
        self.errors += self.skipped_everywhere()
        if exitstatus == pytest.ExitCode.OK and self.errors:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        for error in self.errors:
            terminalreporter.write_line(f"ERROR {error}", red=True)


def _nothing() -> None:
    pass
