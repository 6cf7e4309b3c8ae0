"""Draw: a program as the picture that stands in its paper, as text and as PNG.

Schedules, a line a rank and a column a unit of time. F0.1 is microbatch 0 on the rank's chunk 1,
F3&B1 a forward and a backward computed as one:

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
from mpmp.programs.steps import BACKWARD, FORWARD, WEIGHT, Algorithm, Receive, Reduce
from mpmp.programs.timeline import Span, Timeline

# Calm colours, told apart by the colour-blind too, with their text.
COLOURS = {FORWARD: "#a8c8e8", BACKWARD: "#f3c999", WEIGHT: "#b5d9b0"}
INK, IDLE_COLOUR = "#22303c", "#f1f3f5"
SUM_COLOUR, COPY_COLOUR = "#2f6ea5", "#c77a1e"


def draw(timeline: Timeline) -> str:
    """The timeline as text; an action longer than its name goes on as dashes."""
    unit = _shortest(timeline)
    cells = [(span, *_columns(span, unit)) for span in timeline.spans if span.end > span.start]
    # The narrowest column in which every name fits into the columns of its action.
    width = max((-(-(len(repr(one.action)) + 1) // (e - s)) for one, s, e in cells), default=1)
    lines = [""] * timeline.ranks
    for span, first, end in cells:
        name = repr(span.action)
        filled = -(-(len(name) + 1) // width)
        line = lines[span.rank].ljust(first * width) + name
        line = line.ljust((first + filled) * width)
        lines[span.rank] = line + ("-" * (width - 1) + " ") * (end - first - filled)
    return "\n".join(line.rstrip() for line in lines)


def _columns(span: Span, unit: float) -> tuple[int, int]:
    """First column of an action and the one behind it: halves go up, so that no two fall on one."""
    first = int(span.start / unit + 0.5)
    return first, max(int(span.end / unit + 0.5), first + 1)


def _shortest(timeline: Timeline) -> float:
    """Seconds of the shortest action; those that take no time are not drawn."""
    lengths = (span.end - span.start for span in timeline.spans)
    return min((length for length in lengths if length > 0), default=1.0)


def draw_png(timeline: Timeline, path: str | Path) -> None:
    """The timeline as a picture: a row a rank, a box an action with its microbatch's number.

    Chunks of a rank are told apart by the depth of the colour; of two actions computed as one the
    forward is above.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch, Rectangle

    columns = timeline.makespan / _shortest(timeline)
    inches = min(max(0.42 * columns + 1.2, 6.0), 40.0)
    figure = Figure(figsize=(inches, 0.52 * timeline.ranks + 1.5), layout="constrained")
    axes = figure.subplots()
    for rank in range(timeline.ranks):
        axes.add_patch(Rectangle((0, rank - 0.42), timeline.makespan, 0.84, color=IDLE_COLOUR))
    for span in timeline.spans:
        length, parts = span.end - span.start, span.action.parts
        if not length:
            continue
        height = 0.84 / len(parts)
        # A long timeline has narrow boxes: two digits take about two thirds of a box.
        points = min(10.0 if len(parts) == 1 else 8.0, 36 * inches * length / timeline.makespan)
        for place, part in enumerate(parts):
            top = span.rank - 0.42 + place * height
            colour = _shade(COLOURS[part.kind], part.chunk, timeline.schedule.chunks)
            box = Rectangle((span.start, top), length, height, facecolor=colour, edgecolor="white")
            axes.add_patch(box)
            middle = (span.start + length / 2, top + height / 2)
            number = str(part.microbatch)
            axes.text(*middle, number, ha="center", va="center", color=INK, fontsize=points)
    axes.set_xlim(0, timeline.makespan)
    axes.set_ylim(timeline.ranks - 0.5, -0.5)
    axes.set_yticks(range(timeline.ranks), [f"rank {rank}" for rank in range(timeline.ranks)])
    axes.set_xlabel("time", color=INK)
    axes.tick_params(length=0, colors=INK)
    axes.spines[:].set_visible(False)
    axes.set_title(
        f"{timeline.schedule.name}, {timeline.ranks} ranks, {timeline.microbatches} microbatches: "
        f"bubble {100 * timeline.bubble_rate:.1f} %",
        loc="left",
        color=INK,
    )
    legend = [Patch(color=colour, label=label) for colour, label in _legend(timeline)]
    figure.legend(handles=legend, loc="outside lower right", ncols=len(legend), frameon=False)
    figure.savefig(path, dpi=150)


def _shade(colour: str, chunk: int, chunks: int) -> str:
    """The colour of a chunk: chunk 0 as it is, later ones darker."""
    dark = 0.25 * chunk / max(chunks - 1, 1)
    channels = (int(colour[place : place + 2], 16) for place in (1, 3, 5))
    return "#" + "".join(f"{round(channel * (1 - dark)):02x}" for channel in channels)


def _legend(timeline: Timeline) -> list[tuple[str, str]]:
    """Colours and what they mean; every chunk's own where a rank holds several."""
    schedule = timeline.schedule
    kinds = [(FORWARD, "forward"), (BACKWARD, "backward")]
    if schedule.splits:
        kinds = [(FORWARD, "forward"), (BACKWARD, "input gradient"), (WEIGHT, "weight gradient")]
    found = []
    for kind, label in kinds:
        for chunk in range(schedule.chunks):
            which = f", chunk {chunk}" if schedule.chunks > 1 else ""
            found.append((_shade(COLOURS[kind], chunk, schedule.chunks), label + which))
    return [*found, (IDLE_COLOUR, "idle")]


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
