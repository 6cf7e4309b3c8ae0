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


def training(ranks: Ranks, width: int, layers: int, repeats: int) -> dict[str, Any]:
    """Data parallel steps whose backward takes as long as the sums of all gradients.

    exposed = (step - the same step without sums) / the sums alone, on the slowest rank each.
    """
    model = config.Model(layers=layers, width=width, context=128)
    corpus = load(config.Data())

    def made(rows: int) -> Training:
        asked = config.Config(
            model=model,
            train=config.Train(batch=rows * ranks.world.size),
            parallel=config.Parallel(bucket_mb=0.5),
        )
        return Training(asked, ranks.mesh, setup.make_objective(asked, corpus))

    def step(one: Training) -> None:
        one.pipeline.train(one._microbatches(0), one.objective.counted(0), 1, one.sharded)

    def sums(one: Training) -> None:
        handles = [bucket._reduce.start() for bucket in one.sharded.buckets if bucket._reduce]
        for handle in handles:
            handle.wait()

    def computed(one: Training) -> float:
        kept = [bucket._reduce for bucket in one.sharded.buckets]
        for bucket in one.sharded.buckets:
            bucket._reduce = None
        seconds = ranks.slowest_run(lambda: step(one))
        for bucket, reduce in zip(one.sharded.buckets, kept, strict=True):
            bucket._reduce = reduce
        return seconds

    rows, trial = 2, made(2)
    for _ in range(2):
        ranks.slowest_run(lambda: sums(trial))
        computed(trial)
    alone = statistics.median(ranks.slowest_run(lambda: sums(trial)) for _ in range(3))
    # Backward is two thirds of a step.
    rows = max(1, round(rows * 1.5 * alone / computed(trial)))
    chosen = made(rows)
    step(chosen)
    found = []
    for _ in range(repeats):
        communication = ranks.slowest_run(lambda: sums(chosen))
        computation = computed(chosen)
        both = ranks.slowest_run(lambda: step(chosen))
        exposed = (both - computation) / communication
        found.append([communication, computation, both, exposed])
    return {
        "rows": rows,
        "parameters": sum(one.parameter.numel() for one in chosen.pieces),
        "steps": found,
        "exposed": statistics.median(one[-1] for one in found),
    }


def switch_s() -> float:
    """Processor time of the switch, which is process 1."""
    words = Path("/proc/1/stat").read_text().rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


KINDS: dict[str, Callable[..., Any]] = {
    "bytes": count_bytes,
    "times": time_cases,
    "overlap": overlap,
    "training": training,
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
