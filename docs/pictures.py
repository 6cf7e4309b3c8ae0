"""Draw the pictures under docs/pictures from the programs themselves: ``make docs``.

A picture is never drawn by hand: it shows what the executor and the pipeline carry out.
"""

from __future__ import annotations

from pathlib import Path

from mpmp.programs import collectives, schedules
from mpmp.programs.draw import draw_collective_png, draw_png
from mpmp.programs.simulate import Times, simulate_schedule

FOLDER = Path(__file__).parent / "pictures"
SCHEDULES = {"1f1b": "pipeline_1f1b.png", "gpipe": "pipeline_gpipe.png"}
COLLECTIVES = {
    ("allreduce", "ring"): "allreduce_ring.png",
    ("allreduce", "recursive_doubling"): "allreduce_recursive_doubling.png",
}


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    # A backward computes two gradients for one product of the forward, so it takes twice as long.
    times = Times(forward=1.0, backward=1.0, weight=1.0)
    for name, file in SCHEDULES.items():
        timeline = simulate_schedule(schedules.find(name), stages=4, microbatches=8, times=times)
        draw_png(timeline, FOLDER / file)
        print(f"{FOLDER / file}: bubble {timeline.bubble:.1%}, peak live {timeline.peak_live}")
    for (collective, name), file in COLLECTIVES.items():
        draw_collective_png(collectives.find(collective, name), 4, FOLDER / file)
        print(FOLDER / file)


if __name__ == "__main__":
    main()
