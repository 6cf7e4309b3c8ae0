"""Draw the pictures under docs/pictures from the programs themselves: ``make docs``.

A picture is never drawn by hand: it shows what the executor and the pipeline carry out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mpmp.programs import collectives, schedules
from mpmp.programs.draw import draw_collective_png, draw_png
from mpmp.programs.simulate import Times, simulate_schedule
from mpmp.programs.steps import Algorithm

FOLDER = Path(__file__).parent / "pictures"
SCHEDULES = {"1f1b": "pipeline_1f1b.png", "gpipe": "pipeline_gpipe.png"}
Facts = dict[str, Any]
COLLECTIVES: dict[tuple[str, str], tuple[int, Facts]] = {
    ("allreduce", "ring"): (4, {}),
    ("allreduce", "recursive_doubling"): (4, {}),
    ("allreduce", "rabenseifner"): (4, {}),
    ("allreduce", "double_binary_tree"): (8, {"segments": 2}),
    ("allreduce", "swing"): (8, {}),
    ("allreduce", "hierarchical"): (4, {"hosts": (0, 0, 1, 1)}),
    ("allreduce", "direct"): (4, {}),
    ("allgather", "bruck"): (6, {}),
    ("broadcast", "binomial"): (8, {}),
    ("broadcast", "chain"): (4, {"segments": 3}),
    ("alltoall", "bruck"): (4, {}),
}
"""What is drawn, for how many ranks, and with which facts."""


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    # A backward computes two gradients for one product of the forward, so it takes twice as long.
    times = Times(forward=1.0, backward=1.0, weight=1.0)
    for name, file in SCHEDULES.items():
        timeline = simulate_schedule(schedules.find(name), stages=4, microbatches=8, times=times)
        draw_png(timeline, FOLDER / file)
        print(f"{FOLDER / file}: bubble {timeline.bubble:.1%}, peak live {timeline.peak_live}")
    for (collective, name), (size, facts) in COLLECTIVES.items():
        algorithm = collectives.find(collective, name)
        assert isinstance(algorithm, Algorithm)
        file = FOLDER / f"{collective}_{name}.png"
        draw_collective_png(algorithm, size, file, **facts)
        print(file)


if __name__ == "__main__":
    main()
