"""Measure collectives on emulated hosts: bytes, times against the simulation, overlap.

    python tests/hosts/measure.py                      every part, as Markdown
    python tests/hosts/measure.py --parts overlap --rate 100

Runs with the MPI library of this Python's environment. ``docs/hosts.md`` holds what came out and
says what is measured how.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
if __name__ == "__main__":
    sys.path[0] = str(HERE.parent)
    sys.path.insert(1, str(HERE.parents[1]))

from hosts.emulate import Hosts, lacking  # noqa: E402
from mpmp.programs.cluster import Links  # noqa: E402
from mpmp.programs.fit import Fit, Row, crossover, fit, predict  # noqa: E402

KIB, MIB = 1024, 1 << 20
TUNED: dict[str, str | None] = {
    # Pieces of the executor (2 MiB) go at once, without asking the receiver first: three
    # latencies for a message would else become one, and the link be idle between pieces.
    "OMPI_MCA_btl_tcp_eager_limit": str(2200 * 1000),
    "UCX_TCP_RX_SEG_SIZE": "1m",
}
FLAT = ["rabenseifner", "swing", "reduce_broadcast", "double_binary_tree", "direct"]
"""Algorithms that are predicted from two others, ring and recursive_doubling."""
FITTED_SIZES = [KIB, 16 * KIB, 256 * KIB, 2 * MIB]
HELD_OUT_SIZES = [4 * KIB, 64 * KIB, MIB, 4 * MIB]
BUCKET_BYTES = 25_000_000

Figures = dict[str, Any]


class Cluster:
    """Emulated hosts with a link, and the figures that ranks on them bring back."""

    def __init__(self, hosts: int, rate_mbit: float, delay_us: float, default: bool) -> None:
        self.hosts, self.rate_mbit, self.delay_us = hosts, rate_mbit, delay_us
        self.env = {} if default else TUNED
        self.library = ""
        self._fit: tuple[Fit, list[Figures], list[Figures]] | None = None

    def ask(self, kind: str, ranks_per_host: int = 1, dealt: bool = False, **arguments: Any) -> Any:
        """What ``inside.py`` finds on all ranks."""
        placed = Hosts(
            self.hosts,
            ranks_per_host,
            rate_mbit=self.rate_mbit,
            delay_us=self.delay_us,
            dealt=dealt,
        )
        with tempfile.NamedTemporaryFile(suffix=".json") as file, placed as hosts:
            args = [HERE / "inside.py", file.name, kind, json.dumps(arguments)]
            done = hosts.run(args, timeout=300, env=self.env)
            if done.rc != 0:
                raise SystemExit(f"{kind} failed: {done.text}")
            figures = json.loads(Path(file.name).read_text())
        assert figures["ranks_on_host"] == [ranks_per_host] * self.hosts * ranks_per_host
        self.library = figures["library"]
        return figures["found"]

    def fit(self) -> tuple[Fit, list[Figures], list[Figures]]:
        """The link as ring and recursive doubling show it, their rows, and all others'."""
        if self._fit is None:
            mine = [(name, n) for name in ("ring", "recursive_doubling") for n in FITTED_SIZES]
            others = [(name, n) for name in FLAT for n in HELD_OUT_SIZES]
            others += [(name, n) for name in ("ring", "recursive_doubling") for n in HELD_OUT_SIZES]
            found = self.ask("times", cases=[*mine, *others], repeats=7)
            rows = found[: len(mine)]
            self._fit = fit([self._row(row) for row in rows]), rows, found[len(mine) :]
        return self._fit

    def _row(self, row: Figures) -> Row:
        ranks = self.hosts
        return Row("allreduce", row["algorithm"], ranks, self.hosts, row["bytes"], row["seconds"])

    def predicted(self, links: Fit | Links, algorithm: str, nbytes: int) -> float:
        return predict(links, "allreduce", algorithm, self.hosts, nbytes, self.hosts)


# --- the parts ----------------------------------------------------------------------------------


def bytes_part(cluster: Cluster) -> list[str]:
    """Bytes that leave each rank, by our count and by the network card's."""
    hosts = cluster.hosts
    nbytes = 1_200_000  # every group up to 6 divides its elements
    names = ["ring", "rabenseifner", "swing", "direct", "recursive_doubling"]
    found = cluster.ask("bytes", cases=[(name, nbytes) for name in names])
    bound = 2 * (hosts - 1) * nbytes // hosts
    lines = [
        f"Allreduce of {nbytes:,} B on {hosts} ranks; 2(p-1)/p n = {bound:,} B.",
        "",
        "| algorithm | sent by each rank, B | of the bound | network card, B | headers |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in found:
        assert row["right"], row
        messages, card = row["messages"], statistics.mean(row["card"])
        same = len(set(messages)) == 1
        sent = f"{messages[0]:,}" if same else f"{min(messages):,} to {max(messages):,}"
        share = max(messages) / bound
        lines.append(
            f"| {row['algorithm']} | {sent} | {'equal' if share == 1 else f'{share:.3f}'} "
            f"| {card:,.0f} | {100 * (card / statistics.mean(messages) - 1):.2f} % |"
        )
    return lines


def model_part(cluster: Cluster) -> list[str]:
    """Times that were not fitted beside those that the simulator predicts."""
    known, rows, others = cluster.fit()
    lines = ["```", str(known), "```", ""]
    lines += [
        "| algorithm | bytes | measured ms | predicted ms | error |",
        "|---|---:|---:|---:|---:|",
    ]
    errors = []
    for row in others:
        seconds = cluster.predicted(known, row["algorithm"], row["bytes"])
        errors.append(seconds / row["seconds"] - 1)
        lines.append(
            f"| {row['algorithm']} | {row['bytes']:,} | {1e3 * row['seconds']:.2f} "
            f"| {1e3 * seconds:.2f} | {100 * errors[-1]:+.0f} % |"
        )
    median = statistics.median(map(abs, errors))
    lines += [
        "",
        f"Median error {100 * median:.1f} % over {len(others)} rows that were not fitted "
        f"(fitted: ring and recursive_doubling at {len(rows) // 2} other sizes).",
    ]
    return lines


def crossover_part(cluster: Cluster) -> list[str]:
    """Where a bandwidth-optimal algorithm overtakes the latency-optimal one."""
    known, _, _ = cluster.fit()
    lines = ["| recursive doubling until | predicted, B | measured, B | measured / predicted |"]
    lines += ["|---|---:|---:|---:|"]
    for name in ("ring", "rabenseifner"):
        there = crossover(
            known, "allreduce", "recursive_doubling", name, cluster.hosts, cluster.hosts
        )
        assert there is not None
        sizes = [round(there * 2 ** (step / 2)) // 16 * 16 for step in range(-6, 7)]
        cases = [(one, n) for n in sizes for one in ("recursive_doubling", name)]
        found = cluster.ask("times", cases=cases, repeats=7)
        times = {(row["algorithm"], row["bytes"]): row["seconds"] for row in found}
        gains = [math.log(times["recursive_doubling", n] / times[name, n]) for n in sizes]
        measured = _zero(sizes, gains)
        said = f"{measured:,.0f} | {measured / there:.2f}" if measured else "beyond a factor 8 | -"
        lines.append(f"| {name} | {there:,} | {said} |")
    return lines


def _zero(sizes: Sequence[int], gains: Sequence[float]) -> float | None:
    """The size at which the gain changes its sign for good, between two on a logarithmic scale."""
    for at in range(len(sizes) - 1, 0, -1):
        low, high = gains[at - 1], gains[at]
        if low < 0 <= high:
            share = -low / (high - low)
            return float(sizes[at - 1] * (sizes[at] / sizes[at - 1]) ** share)
    return None


def hosts_part(cluster: Cluster) -> list[str]:
    """Two ranks on each host, which share its link, placed one after another or in turns."""
    names = ["hierarchical", "ring", *FLAT, "recursive_doubling"]
    sizes = [64 * KIB, MIB, 4 * MIB]
    lines = []
    for dealt in (False, True):
        cases = [(name, n) for n in sizes for name in names]
        found = cluster.ask("times", ranks_per_host=2, dealt=dealt, cases=cases, repeats=5)
        times = {(row["algorithm"], row["bytes"]): 1e3 * row["seconds"] for row in found}
        placed = "0 1 2 3 0 1 2 3" if dealt else "0 0 1 1 2 2 3 3"
        head = " | ".join(f"{n // KIB:,} KiB" for n in sizes)
        lines += [f"| ms; ranks on hosts {placed} | {head} |", "|---|" + "---:|" * len(sizes)]
        for name in names:
            lines.append(f"| {name} | " + " | ".join(f"{times[name, n]:.1f}" for n in sizes) + " |")
        cells = []
        for n in sizes:
            least, best = min((times[name, n], name) for name in names[1:])
            cells.append(f"{least / times['hierarchical', n]:.2f} ({best})")
        lines += [f"| the best other / hierarchical | {' | '.join(cells)} |", ""]
    return lines


def overlap_part(cluster: Cluster) -> list[str]:
    """A bucket of gradients that is summed while the ranks compute."""
    found = cluster.ask("overlap", nbytes=BUCKET_BYTES, algorithm="ring", repeats=5)
    cores = len(os.sched_getaffinity(0))
    lines = [
        "| alone, s | computation, s | both, s | hidden | switch, core s | hidden without it |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    without = []
    for row in found["rows"]:
        # The cores that compute also do the network's own work, which a network does itself.
        without.append(row["hidden"] + row["switch"] / cores / row["communication"])
        lines.append(
            f"| {row['communication']:.3f} | {row['computation']:.3f} | {row['both']:.3f} "
            f"| {100 * row['hidden']:.0f} % | {row['switch']:.2f} | {100 * without[-1]:.0f} % |"
        )
    lines += [
        "",
        f"{BUCKET_BYTES:,} B, {found['algorithm']}, medians of {len(found['rows'])}: "
        f"{100 * found['hidden']:.0f} % hidden, {100 * statistics.median(without):.0f} % without "
        f"the switch; the same allreduce in the calling thread takes {found['blocking']:.3f} s.",
    ]
    return lines


def training_part(cluster: Cluster) -> list[str]:
    """Data parallel training steps, whose gradients are summed during backward."""
    lines = [
        "| backward | sums alone, s | step without sums, s | its backward, s | step, s | exposed |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for pauses, name in ((True, "pauses"), (False, "computes on shared cores")):
        found = cluster.ask("training", width=160, layers=8, repeats=7, pauses=pauses)
        columns = ("communication", "computation", "backward", "both")
        for row in found["steps"]:
            times = " | ".join(f"{row[column]:.3f}" for column in columns)
            lines.append(f"| {name} | {times} | {100 * row['exposed']:.0f} % |")
        lines.append(f"| {name}, median | | | | | {100 * found['exposed']:.0f} % |")
    lines += [
        "",
        f"{found['parameters']:,} parameters in float32 in {len(found['buckets'])} buckets.",
    ]
    return lines


def tensor_part(cluster: Cluster) -> list[str]:
    """Tensor parallel steps, whose sums and gathers move beside products, and not."""
    lines = ["| | at once, s | waiting | beside, s | waiting | speedup |", "|---|" + "---:|" * 5]
    for sequence in (False, True):
        model = {"layers": 4, "width": 384, "heads": 6, "context": 256}
        found = cluster.ask("tensor", model=model, sequence=sequence, repeats=7)
        columns = ("off", "off waits", "on", "on waits")
        times = {name: statistics.median(row[name] for row in found) for name in columns}
        ratios = statistics.median(row["off"] / row["on"] for row in found)
        cells = " | ".join(f"{times[name]:.3f}" for name in columns)
        lines.append(f"| tp{cluster.hosts}{'.sp' * sequence} | {cells} | {ratios:.2f} |")
    return lines


PARTS: dict[str, Callable[[Cluster], list[str]]] = {
    "bytes": bytes_part,
    "model": model_part,
    "crossover": crossover_part,
    "hosts": hosts_part,
    "overlap": overlap_part,
    "training": training_part,
    "tensor": tensor_part,
}


def main() -> None:
    """Parse the command line, measure, and print each part when it is known."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--hosts", type=int, default=4)
    parser.add_argument("--rate", type=float, default=200, help="Mbit/s")
    parser.add_argument("--delay-us", type=float, default=1000)
    parser.add_argument("--default", action="store_true", help="leave the MPI library as it is")
    asked = parser.parse_args()
    if reason := lacking():
        parser.error(reason)
    cluster = Cluster(asked.hosts, asked.rate, asked.delay_us, asked.default)
    for name in asked.parts.split(","):
        lines = PARTS[name](cluster)
        where = f"{cluster.hosts} hosts, {cluster.rate_mbit:g} Mbit/s, {cluster.delay_us:g} us"
        print("\n".join([f"### {name}: {cluster.library}, {where}", "", *lines, ""]), flush=True)


if __name__ == "__main__":
    main()
