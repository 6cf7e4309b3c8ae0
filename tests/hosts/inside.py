"""What the ranks of an emulated cluster measure; ``measure.py`` starts them and reads the figures.

inside.py FILE KIND JSON        rank 0 leaves its figures in FILE
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from mpmp import config
from mpmp.comm.bridge import Bridged
from mpmp.comm.group import Group
from mpmp.comm.mesh import Mesh
from mpmp.comm.world import World, start
from mpmp.data.loader import load
from mpmp.job import setup
from mpmp.job.training import Training
from mpmp.parallel import landing

Case = Sequence[Any]
"""Algorithm of allreduce, bytes."""
BATCH_S = 0.01
"""Calls between two barriers last at least that long, ten latencies."""


def sent_bytes() -> int:
    """What this host's network card has sent since it exists, headers included."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, counts = line.partition(":")
        if name.strip() == "eth0":
            return int(counts.split()[8])
    raise AssertionError("no eth0: this is no emulated host")


class Ranks:
    """All ranks of the job and what they say to one another aside from what is measured."""

    def __init__(self) -> None:
        self.world: World = start("cpu")
        self.mesh = Mesh.over(self.world)
        self.group: Group = self.mesh.everyone

    def all(self, value: Any) -> list[Any]:
        return [json.loads(text) for text in self.world.gather_texts(json.dumps(value))]

    def slowest(self, seconds: float) -> float:
        return max(self.all(seconds))

    def slowest_run(self, call: Callable[[], object], times: int = 1) -> float:
        """Seconds of a call on the slowest rank, of several in a row."""
        self.group.barrier()
        began = time.perf_counter()
        for _ in range(times):
            call()
        return self.slowest((time.perf_counter() - began) / times)

    def before_others(self) -> None:
        """Have the cores before whatever else runs on this machine; yields still go in turns."""
        try:
            os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
        except PermissionError:
            pass

    def before_other_sessions(self) -> None:
        """The same for threads that share a core, which real-time ones would not."""
        try:
            Path("/proc/self/autogroup").write_text("-20")
        except OSError:  # the kernel has no such groups
            pass


# --- bytes --------------------------------------------------------------------------------------


def count_bytes(ranks: Ranks, cases: Sequence[Case]) -> list[dict[str, Any]]:
    """Bytes of the messages of one allreduce, and what passed the card, of each rank."""
    found = []
    for algorithm, nbytes in cases:
        x = torch.ones(nbytes // 4)
        handle = ranks.group.prepare_allreduce(x, algorithm=algorithm)
        handle.run()
        right = ranks.all(bool((x == ranks.world.size).all()))
        # Of a bridge's three parts the second leaves the host.
        sent: Any = handle.parts[1] if isinstance(handle, Bridged) else handle
        messages = sum(
            piece.length * 4
            for exchange in sent._plan.exchanges
            for wave in exchange.waves
            for piece in wave.pieces
            if piece.sends
        )
        ranks.group.barrier()
        before = sent_bytes()
        ranks.group.barrier()  # all ranks of a host have read its counter
        handle.run()
        ranks.group.barrier()
        card = sent_bytes() - before
        said = ranks.all([messages, card])
        found.append(
            {
                "algorithm": algorithm,
                "bytes": nbytes,
                "messages": [one[0] for one in said],
                "card": [one[1] for one in said],
                "right": all(right),
            }
        )
        handle.free()
    return found


# --- times --------------------------------------------------------------------------------------


def time_cases(ranks: Ranks, cases: Sequence[Case], repeats: int) -> list[dict[str, Any]]:
    """Median over repeats of the slowest rank's time, all cases taking turns."""
    ranks.before_others()
    runs = []
    for algorithm, nbytes in cases:
        x = torch.zeros(nbytes // 4)
        handle = ranks.group.prepare_allreduce(x, algorithm=algorithm)
        ranks.slowest_run(handle.run)
        times = max(1, min(10, round(BATCH_S / ranks.slowest_run(handle.run))))
        runs.append((handle, times, []))
    for _ in range(repeats):
        for handle, times, samples in runs:
            samples.append(ranks.slowest_run(handle.run, times))
    return [
        {
            "algorithm": algorithm,
            "bytes": nbytes,
            "seconds": statistics.median(samples),
            "least": min(samples),
            "most": max(samples),
        }
        for (algorithm, nbytes), (_, _, samples) in zip(cases, runs, strict=True)
    ]


# --- overlap ------------------------------------------------------------------------------------


def overlap(ranks: Ranks, nbytes: int, algorithm: str, repeats: int) -> dict[str, Any]:
    """A started allreduce beside matrix products that take as long as it does.

    hidden = (communication + computation - both) / communication, each on the slowest rank;
    ``switch`` is the processor time that the emulated network takes for one allreduce.
    """
    ranks.before_other_sessions()
    x = torch.zeros(nbytes // 4)
    handle = ranks.group.prepare_allreduce(x, algorithm=algorithm)
    a, b = torch.rand(256, 256), torch.rand(256, 256)
    out = torch.empty(256, 256)

    def compute(times: int) -> None:
        for _ in range(times):
            torch.mm(a, b, out=out)

    def communicate() -> None:
        handle.start().wait()

    def both(times: int) -> None:
        started = handle.start()
        compute(times)
        started.wait()

    ranks.slowest_run(communicate)
    communication = statistics.median(ranks.slowest_run(communicate) for _ in range(3))
    blocking = statistics.median(ranks.slowest_run(handle.run) for _ in range(2))
    times = 200
    for _ in range(3):
        computation = ranks.slowest_run(lambda: compute(times))  # noqa: B023
        times = max(1, round(times * communication / computation))
    rows = []
    for _ in range(repeats):
        before = switch_s()
        alone = ranks.slowest_run(communicate)
        switch = switch_s() - before
        computation = ranks.slowest_run(lambda: compute(times))
        together = ranks.slowest_run(lambda: both(times))
        rows.append(
            {
                "communication": alone,
                "computation": computation,
                "both": together,
                "hidden": (alone + computation - together) / alone,
                "switch": switch,
            }
        )
    return {
        "bytes": nbytes,
        "algorithm": algorithm,
        "blocking": blocking,
        "products": times,
        "rows": rows,
        "hidden": statistics.median(row["hidden"] for row in rows),
    }


class Timed:
    """Training steps of a data parallel GPT, with the sums of its gradients and without.

    With ``pauses`` each layer's backward is followed by one and the batch is a sequence a rank: so
    it computes on a host with cores enough, of which emulated hosts have none of their own.
    """

    def __init__(
        self, ranks: Ranks, width: int, layers: int, rows: int, bucket_mb: float | None
    ) -> None:
        self.rows, self.pause_s, self._began = rows, 0.0, 0.0
        asked = config.Config(
            model=config.Model(layers=layers, width=width, context=128),
            train=config.Train(batch=rows * ranks.world.size),
            parallel=config.Parallel(bucket_mb=bucket_mb),
        )
        objective = setup.make_objective(asked, load(config.Data()))
        self._ranks, self._training = ranks, Training(asked, ranks.mesh, objective)
        self.sharded = self._training.sharded
        for stage in self._training.stages:
            for block in stage.blocks:
                block.register_full_backward_hook(lambda *_: time.sleep(self.pause_s))
        writing = self.sharded.writing

        def timed(*args: Any, **kwargs: Any) -> Any:
            self._began = time.perf_counter()
            return writing(*args, **kwargs)

        self.sharded.writing = timed  # type: ignore[method-assign]

    def step(self) -> float:
        """Seconds of a step on the slowest rank."""
        one = self._training
        batch, counted = one._microbatches(0), one.objective.counted(0)
        return self._ranks.slowest_run(lambda: one.pipeline.train(batch, counted, 1, one.sharded))

    def sums(self) -> float:
        """Seconds of the sums of all gradients alone."""

        def run() -> None:
            handles = [bucket._reduce.start() for bucket in self.sharded.buckets if bucket._reduce]
            for handle in handles:
                handle.wait()

        return self._ranks.slowest_run(run)

    def computed(self) -> tuple[float, float]:
        """Seconds of a step without sums and of its backward."""
        kept = [bucket._reduce for bucket in self.sharded.buckets]
        for bucket in self.sharded.buckets:
            bucket._reduce = None
        ended: list[float] = []
        self.sharded.finish = lambda: ended.append(time.perf_counter())  # type: ignore[method-assign]
        step = self.step()
        del self.sharded.finish
        for bucket, reduce in zip(self.sharded.buckets, kept, strict=True):
            bucket._reduce = reduce
            for one in bucket.flat.parameters:
                landing.end(one)
        return step, self._ranks.slowest(ended[0] - self._began)


def training(
    ranks: Ranks,
    width: int,
    layers: int,
    repeats: int,
    bucket_mb: float | None = None,
    pauses: bool = False,
) -> dict[str, Any]:
    """Data parallel steps whose backward takes as long as the sums of all gradients.

    exposed = (step - the same step without sums) / the sums alone, on the slowest rank each.
    """
    ranks.before_other_sessions()
    rows = 1 if pauses else 4
    one = Timed(ranks, width, layers, rows, bucket_mb)
    one.step()
    alone = statistics.median(one.sums() for _ in range(3))
    for _ in range(3):
        _, backward = one.computed()
        if pauses:
            one.pause_s = max(0.0, one.pause_s + (alone - backward) / layers)
        else:
            rows = max(1, round(rows * alone / backward))
            one = Timed(ranks, width, layers, rows, bucket_mb)
            one.step()
    found = []
    for _ in range(repeats):
        before = switch_s()
        communication = one.sums()
        switch = switch_s() - before
        computation, backward = one.computed()
        both = one.step()
        found.append(
            {
                "communication": communication,
                "computation": computation,
                "backward": backward,
                "both": both,
                "exposed": (both - computation) / communication,
                "switch": switch,
            }
        )
    return {
        "rows": rows,
        "parameters": sum(one.memory.numel() for one in one.sharded.buckets),
        "buckets": [bucket.memory.nbytes for bucket in one.sharded.buckets],
        "steps": found,
        "exposed": statistics.median(row["exposed"] for row in found),
    }


# --- tensor parallel steps ------------------------------------------------------------------------


class Cut:
    """Training steps of a GPT whose layers are cut over all ranks."""

    def __init__(self, ranks: Ranks, overlap: str, sequence: bool, model: dict[str, int]) -> None:
        asked = config.Config(
            model=config.Model(**model),
            train=config.Train(batch=4),
            parallel=config.Parallel(tensor=ranks.world.size, sequence=sequence),
            comm=config.Comm(overlap=overlap),  # type: ignore[arg-type]
        )
        objective = setup.make_objective(asked, load(config.Data()))
        self._ranks, self.mesh = ranks, setup.make_mesh(asked, ranks.world)
        self._training = Training(asked, self.mesh, objective)

    def step(self) -> tuple[float, float]:
        """Seconds of a forward and backward on the slowest rank, and of waiting in them."""
        one, group = self._training, self.mesh.tensor
        batch, counted = one._microbatches(0), one.objective.counted(0)
        before = group.spent_s
        step = self._ranks.slowest_run(lambda: one.pipeline.train(batch, counted, 1, one.sharded))
        return step, self._ranks.slowest(group.spent_s - before)


def tensor(
    ranks: Ranks, model: dict[str, int], sequence: bool, repeats: int
) -> list[dict[str, float]]:
    """Steps with movements at once and beside products, in turns."""
    ranks.before_other_sessions()
    ways = {name: Cut(ranks, name, sequence, model) for name in ("off", "on")}
    rows = []
    for _ in range(repeats + 1):
        row = {}
        for name, one in ways.items():
            row[name], row[f"{name} waits"] = one.step()
        rows.append(row)
    for one in ways.values():
        one.mesh.free()
    return rows[1:]


def switch_s() -> float:
    """Processor time of the switch, which is process 1."""
    words = Path("/proc/1/stat").read_text().rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


KINDS: dict[str, Callable[..., Any]] = {
    "bytes": count_bytes,
    "times": time_cases,
    "overlap": overlap,
    "training": training,
    "tensor": tensor,
}


def main() -> None:
    path, kind, arguments = sys.argv[1:]
    ranks = Ranks()
    found = KINDS[kind](ranks, **json.loads(arguments))
    hosts = ranks.all(ranks.world.ranks_on_host)
    if ranks.world.rank == 0:
        figures = {"library": ranks.world.library, "ranks_on_host": hosts, "found": found}
        Path(path).write_text(json.dumps(figures))
    ranks.mesh.free()


if __name__ == "__main__":
    main()
