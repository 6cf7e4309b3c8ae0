"""Draw: a program as the picture that stands in its paper, as text and as PNG.

Schedules, a line a stage and a column a unit of time:

    F0 F1    B0    B1
       F0 B0 F1 B1

Collectives, a line a round and a column a rank; a cell says which chunks go to whom, ``+>`` where
they are combined there and ``=>`` where they are copied.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mpmp.programs.exchange import Message
from mpmp.programs.follow import follow_collective
from mpmp.programs.simulate import Timeline
from mpmp.programs.steps import FORWARD, Algorithm, Receive, Reduce

# Two calm colours, told apart by the colour-blind too, with their text.
FORWARD_COLOUR, BACKWARD_COLOUR, INK = "#a8c8e8", "#f3c999", "#22303c"
SUM_COLOUR, COPY_COLOUR = "#2f6ea5", "#c77a1e"


def draw(timeline: Timeline) -> str:
    """The timeline as text; an action longer than the shortest one goes on as dashes."""
    unit = min((span.end - span.start for span in timeline.spans), default=1.0)
    width = 1 + max((len(repr(span.action)) for span in timeline.spans), default=0)
    lines = []
    for stage in range(timeline.stages):
        line = ""
        for span in timeline.of(stage):
            # Halves go up, so that no two actions fall on one column.
            first, end = int(span.start / unit + 0.5), int(span.end / unit + 0.5)
            line = line.ljust(first * width) + repr(span.action)
            line = line.ljust((first + 1) * width) + ("-" * (width - 1) + " ") * (end - first - 1)
        lines.append(line.rstrip())
    return "\n".join(lines)


def draw_png(timeline: Timeline, path: str | Path) -> None:
    """The timeline as a picture: a row a stage, a box an action with its microbatch's number."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch, Rectangle

    shortest = min((span.end - span.start for span in timeline.spans), default=1.0)
    columns = timeline.makespan / shortest
    inches = min(max(0.42 * columns + 1.2, 6.0), 40.0)
    figure = Figure(figsize=(inches, 0.52 * timeline.stages + 1.5), layout="constrained")
    axes = figure.subplots()
    for stage in range(timeline.stages):
        axes.add_patch(Rectangle((0, stage - 0.42), timeline.makespan, 0.84, color="#f1f3f5"))
    for span in timeline.spans:
        colour = FORWARD_COLOUR if span.action.kind == FORWARD else BACKWARD_COLOUR
        length = span.end - span.start
        corner = (span.start, span.stage - 0.42)
        axes.add_patch(Rectangle(corner, length, 0.84, facecolor=colour, edgecolor="white"))
        middle, number = (span.start + length / 2, span.stage), str(span.action.microbatch)
        # A long timeline has narrow boxes: two digits take about two thirds of a box.
        points = min(10.0, 0.5 * 72 * inches * length / timeline.makespan)
        axes.text(*middle, number, ha="center", va="center", color=INK, fontsize=points)
    axes.set_xlim(0, timeline.makespan)
    axes.set_ylim(timeline.stages - 0.5, -0.5)
    axes.set_yticks(range(timeline.stages), [f"stage {s}" for s in range(timeline.stages)])
    axes.set_xlabel("time", color=INK)
    axes.tick_params(length=0, colors=INK)
    axes.spines[:].set_visible(False)
    axes.set_title(
        f"{timeline.name}, {timeline.stages} stages, {timeline.microbatches} microbatches: "
        f"bubble {100 * timeline.bubble:.1f} %",
        loc="left",
        color=INK,
    )
    kinds = [
        Patch(color=FORWARD_COLOUR, label="forward"),
        Patch(color=BACKWARD_COLOUR, label="backward"),
        Patch(color="#f1f3f5", label="idle"),
    ]
    figure.legend(handles=kinds, loc="outside lower right", ncols=3, frameon=False)
    figure.savefig(path, dpi=150)


def draw_collective(algorithm: Algorithm, size: int, **facts: Any) -> str:
    """Who sends what to whom, round by round, as a text table."""
    rows = [["round", *(f"rank {rank}" for rank in range(size))]]
    for number, exchange in enumerate(follow_collective(algorithm, size, **facts)):
        cells: list[list[str]] = [[] for _ in range(size)]
        for message in exchange.messages:
            for kind, arrow in ((Reduce, "+>"), (Receive, "=>")):
                chunks = _chunks(message, kind)
                if chunks:
                    cells[message.sender].append(f"{chunks} {arrow} {message.receiver}")
        rows.append([str(number), *(", ".join(cell) for cell in cells)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def _chunks(message: Message, kind: type[Receive] | type[Reduce]) -> str:
    """The chunks of a message that are combined, or copied, neighbours as one span: ``4-6 0``."""
    spans: list[list[int]] = []
    for send, put in zip(message.sends, message.puts, strict=True):
        if not isinstance(put, kind):
            continue
        if spans and spans[-1][1] == send.chunk:
            spans[-1][1] += send.count
        else:
            spans.append([send.chunk, send.chunk + send.count])
    return " ".join(
        str(first) if stop == first + 1 else f"{first}-{stop - 1}" for first, stop in spans
    )


def draw_collective_png(algorithm: Algorithm, size: int, path: str | Path, **facts: Any) -> None:
    """The messages as a picture: ranks side by side, time downwards, an arrow with its chunks."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    rounds = follow_collective(algorithm, size, **facts)
    figure = Figure(figsize=(max(1.1 * size + 1.2, 5.0), 0.85 * len(rounds) + 1.6))
    figure.set_layout_engine("constrained")
    axes = figure.subplots()
    axes.vlines(range(size), -0.15, len(rounds) + 0.15, color="#dde2e6", linewidth=6, zorder=0)
    for number, exchange in enumerate(rounds):
        for message in exchange.messages:
            start, end = (message.sender, number + 0.1), (message.receiver, number + 0.9)
            summed, copied = _chunks(message, Reduce), _chunks(message, Receive)
            colour = SUM_COLOUR if summed else COPY_COLOUR
            arrow = {"arrowstyle": "-|>", "color": colour, "linewidth": 1.4, "shrinkA": 0}
            axes.annotate("", xy=end, xytext=start, arrowprops=arrow)
            # Close to the tail the arrows of a round are still apart.
            along = 0.3 / abs(message.receiver - message.sender)
            axes.text(
                start[0] + along * (end[0] - start[0]),
                start[1] + along * (end[1] - start[1]),
                f"{summed} {copied}".strip(),
                ha="center",
                va="center",
                fontsize=8,
                color=colour,
                bbox={"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none"},
            )
    axes.set_xlim(-0.5, size - 0.5)
    axes.set_ylim(len(rounds) + 0.2, -0.2)
    axes.set_xticks(range(size), [f"rank {rank}" for rank in range(size)])
    axes.xaxis.tick_top()
    axes.set_yticks([number + 0.5 for number in range(len(rounds))], map(str, range(len(rounds))))
    axes.set_ylabel("round", color=INK)
    axes.tick_params(length=0, colors=INK)
    axes.spines[:].set_visible(False)
    cost = algorithm.cost(size, **facts)
    name = getattr(algorithm.program, "__name__", "program")
    published = f"{cost.rounds} rounds, {cost.sent} n sent, {cost.reduced} n reduced"
    figure.suptitle(f"{name}: {published}", color=INK)
    kinds = [
        Line2D([], [], color=SUM_COLOUR, label="combined"),
        Line2D([], [], color=COPY_COLOUR, label="copied"),
    ]
    figure.legend(handles=kinds, loc="outside lower right", ncols=2, frameon=False)
    figure.savefig(path, dpi=150)
