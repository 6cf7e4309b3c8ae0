"""Draw the pictures under docs/pictures from the programs themselves: ``make docs``.

A picture is never drawn by hand: it shows what the executor and the pipeline carry out. In
schedules.md the text below a line ``<!-- picture: SCHEDULE, RANKS, MICROBATCHES -->`` is one, too.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mpmp.programs import collectives, schedules
from mpmp.programs.draw import draw, draw_collective_png, draw_png
from mpmp.programs.steps import Algorithm
from mpmp.programs.timeline import Times, simulate_schedule

FOLDER = Path(__file__).parent / "pictures"
SCHEDULES_PAGE = Path(__file__).parent / "schedules.md"
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


def with_pictures(page: str) -> str:
    """The page with every picture in it drawn anew."""

    def picture(match: re.Match[str]) -> str:
        name, ranks, microbatches = match["what"].rsplit(",", 2)
        timeline = simulate_schedule(schedules.find(name), int(ranks), int(microbatches))
        return f"<!-- picture: {match['what']} -->\n```\n{draw(timeline)}\n```"

    return re.sub(r"<!-- picture: (?P<what>.*) -->\n```\n(?:.*\n)*?```", picture, page)


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    SCHEDULES_PAGE.write_text(with_pictures(SCHEDULES_PAGE.read_text()))
    # A backward computes two gradients for one product of the forward, so it takes twice as long.
    times = Times(forward=1.0, backward=1.0, weight=1.0)
    for name, schedule in schedules.SCHEDULES.items():
        timeline = simulate_schedule(schedule, 4, 8, times.cut(schedule.chunks))
        file = FOLDER / f"pipeline_{name}.png"
        draw_png(timeline, file)
        print(f"{file}: bubble {timeline.bubble_rate:.1%}, peak live {timeline.peak_live}")
    for (collective, name), (size, facts) in COLLECTIVES.items():
        algorithm = collectives.find(collective, name)
        assert isinstance(algorithm, Algorithm)
        file = FOLDER / f"{collective}_{name}.png"
        draw_collective_png(algorithm, size, file, **facts)
        print(file)


if __name__ == "__main__":
    main()
