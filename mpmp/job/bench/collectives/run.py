"""The bench of collectives: measure, show, and write what was found."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch

from mpmp.comm.group import Group
from mpmp.comm.mesh import Mesh
from mpmp.comm.native import DTYPES as NATIVE_DTYPES
from mpmp.comm.native import forced
from mpmp.comm.world import World, start
from mpmp.errors import VerifyError
from mpmp.job.bench.baselines import gloo
from mpmp.job.bench.collectives import models, oracle, outputs, tables
from mpmp.job.bench.collectives.bound import Bound, bound_calls
from mpmp.job.bench.collectives.contenders import Contender, Task, enter
from mpmp.job.bench.collectives.rows import Row
from mpmp.job.bench.collectives.settings import AUTO, Collectives, size_name
from mpmp.job.bench.collectives.turns import medians
from mpmp.job.report import Reporter, duration

_MEMORY = {"window": "shared windows", "ordinary": "ordinary memory"}


def bench(settings: Collectives) -> None:
    """Time every contender, print tables, and write the files that were asked for."""
    world = start("cpu", settings.comm.timeout_s)
    if world.rank == 0:
        outputs.require(settings, world.library)
    mesh = Mesh.over(world, settings=settings.comm)
    session = Session(settings, world, mesh.everyone)
    with ExitStack() as open_:
        if "gloo" in settings.baselines:
            open_.enter_context(gloo(world, session.num_hosts == 1))
        session.measure()
    session.conclude()
    mesh.free()
    wrong = [row for row in session.rows if row.wrong]
    if wrong:
        raise VerifyError(
            f"{len(wrong)} of {len(session.rows)} rows have wrong elements, the first is "
            f"{wrong[0].collective} {wrong[0].algorithm} of {size_name(wrong[0].bytes)}"
        )


class Session:
    """What is measured in one run."""

    def __init__(self, settings: Collectives, world: World, group: Group) -> None:
        self.settings, self.world, self.group = settings, world, group
        self.dtype: torch.dtype = getattr(torch, settings.dtype)
        self.num_hosts = len(set(group.hosts))
        shared = settings.placement == "window" and group.windows is not None
        self.placement = "window" if shared else "ordinary"
        self.report = Reporter(world.rank == 0, every=1)
        self.rows: list[Row] = []
        self.chosen: dict[tuple[str, int], str] = {}
        self.left_out: set[tuple[str, str]] = set()
        self.bound: Bound | None = None

    # --- measuring --------------------------------------------------------------------------------

    def measure(self) -> None:
        """All collectives at all sizes, a line a size and a table a collective."""
        self.report.line(self._head())
        tasks = self._tasks()
        began = time.perf_counter()
        for done, task in enumerate(tasks, start=1):
            found = self._measure_one(task)
            self.rows += found
            spent = time.perf_counter() - began
            left = duration(spent / done * (len(tasks) - done))
            self.report.line(
                f"  {done}/{len(tasks)}  {task.collective} {size_name(task.nbytes)}: "
                f"{len(found)} contenders, {duration(spent)} gone, about {left} to go"
            )
            if done == len(tasks) or tasks[done].collective != task.collective:
                mine = [row for row in self.rows if row.collective == task.collective]
                if mine:
                    self._section(task.collective, tables.figures(mine))

    def _tasks(self) -> list[Task]:
        found = [
            Task(
                name,
                oracle.num_elements(name, nbytes, self.world.size, self.dtype.itemsize),
                self.dtype,
                self.group,
            )
            for name in self.settings.names
            for nbytes in self.settings.lengths
        ]
        return list(dict.fromkeys(found))  # all lengths of a barrier are one

    def _measure_one(self, task: Task) -> list[Row]:
        contenders, left_out = enter(task, self.settings)
        self._tell(task.collective, left_out)
        given, right = task.given(), task.expected()
        wrong = self._all([one.num_wrong(given, right) for one in contenders])
        for one in contenders:
            one.clear()
        calls: list[Callable[[], object]] = [one.call for one in contenders]
        memory = bound_calls(task) if task == self._bounded_task() else []
        repeats, seconds = self.settings.repeats, self.settings.seconds
        times = medians([*calls, *memory], self.group, self.world, repeats, seconds)
        strayed = self._all([one.num_strayed() for one in contenders])
        if memory:
            self.bound = Bound(task.nbytes, self.world.size, min(times[len(calls) :]))
        rows = []
        for at, one in enumerate(contenders):
            if one.name == AUTO:
                self.chosen[task.collective, task.nbytes] = one.took
            rows.append(self._row(task, one, times[at], wrong[at] + strayed[at]))
            one.free()
        return rows

    def _row(self, task: Task, one: Contender, seconds: float, wrong: int) -> Row:
        size, dtype = self.world.size, self.settings.dtype
        return Row.of(task.collective, one.name, dtype, size, task.nbytes, seconds, wrong)

    def _bounded_task(self) -> Task | None:
        """The task beside which memory itself is measured."""
        mine = [task for task in self._tasks() if task.collective == "allreduce"]
        return mine[-1] if mine and self.settings.bound else None

    def _all(self, counts: Sequence[int]) -> list[int]:
        """Counts of all ranks added; by the library, not by what is measured."""
        every = [json.loads(text) for text in self.world.gather_texts(json.dumps(list(counts)))]
        return [sum(one) for one in zip(*every, strict=True)]

    # --- showing ----------------------------------------------------------------------------------

    def conclude(self) -> None:
        """What follows from all rows, on rank 0, which writes the files."""
        if self.world.rank != 0:
            return
        if self.chosen:
            self._section("automatic choice", tables.choices(self.rows, self.chosen))
        known = models.fit(self.rows, self.num_hosts)
        if known is not None:
            self._section("links fitted to these times, with intervals of 95 %", str(known))
            pairs = models.predicted(self.rows, known, self.num_hosts)
            self._section("simulated with these links", tables.predictions(pairs))
        if self.bound is not None:
            self._section("memory", tables.shares(self.bound, self.rows))
        written = outputs.write(
            self.settings, self.rows, known, self.world.library, self.num_hosts, self.placement
        )
        for sentence in written:
            self.report.line(sentence)

    def _tell(self, collective: str, left_out: dict[str, str]) -> None:
        """Say once of every algorithm why it is not among the contenders."""
        for name, why in left_out.items():
            if (collective, name) not in self.left_out:
                self.left_out.add((collective, name))
                self.report.line(f"  without {collective} {name}: {why}")

    def _section(self, title: str, text: str) -> None:
        self.report.line(f"\n{title}\n{text}\n")

    def _head(self) -> str:
        settings = self.settings
        hosts = "1 host" if self.num_hosts == 1 else f"{self.num_hosts} hosts"
        lines = [
            f"{self.world.size} ranks on {hosts}, {self.world.library}, torch {torch.__version__}",
            f"{settings.dtype}, our tensors in {_MEMORY[self.placement]}, medians of "
            f"{settings.repeats} repeats",
        ]
        if self.placement != settings.placement:
            lines.append(f"no shared windows: {self.group.windows_reason}")
        if "native" in settings.baselines:
            known = self.dtype in NATIVE_DTYPES
            said = forced() or "as the library chooses, nothing is forced"
            lines.append(f"native: {said if known else f'MPI has no {settings.dtype}'}")
        return "\n".join(lines)
