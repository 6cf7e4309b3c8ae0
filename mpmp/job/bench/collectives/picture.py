"""Time over bytes as a picture, a panel a collective; the baselines are dashed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mpmp.errors import ConfigError, InputOutputError
from mpmp.job.bench.collectives.rows import Row
from mpmp.job.bench.collectives.settings import AUTO, BASELINES, size_name

_COLOURS = ["#4878a8", "#d98a3d", "#6a9f58", "#a86a9c", "#c2a83e", "#5fa8a0", "#b5615a", "#8c7a66"]
_STYLES = {"native": ("#333333", "--"), "gloo": ("#999999", "--"), AUTO: ("#111111", ":")}
_PANELS_A_LINE = 3
_MOST_TICKS = 8


def require_matplotlib(path: str) -> None:
    """Refuse before hours of measuring what cannot be drawn afterwards."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            f"--png {path} needs matplotlib, which is missing: pip install matplotlib"
        ) from error
    known = Figure().canvas.get_supported_filetypes()
    if Path(path).suffix[1:] not in known:
        raise ConfigError(
            f"--png {path} must end with a format: {', '.join(map('.{}'.format, known))}"
        )


def draw(path: str, rows: Sequence[Row], title: str) -> None:
    """Write the picture; the end of the name says its format."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row.collective for row in rows if row.bytes))
    across = min(_PANELS_A_LINE, max(1, len(names)))
    down = max(1, -(-len(names) // across))
    figure = Figure(figsize=(5.2 * across, 3.9 * down), layout="constrained")
    figure.suptitle(title, fontsize=10)
    panels = figure.subplots(down, across, squeeze=False).flatten()
    for name, panel in zip(names, panels, strict=False):
        _draw_panel(panel, name, [row for row in rows if row.collective == name])
    for panel in panels[len(names) :]:
        panel.set_axis_off()
    try:
        figure.savefig(path, dpi=130)
    except OSError as error:
        raise InputOutputError(f"{path} cannot be written: {error.strerror}") from error


def _draw_panel(panel, name: str, rows: Sequence[Row]) -> None:  # type: ignore[no-untyped-def]
    ours = list(dict.fromkeys(row.algorithm for row in rows))
    colours = iter(_COLOURS * (1 + len(ours) // len(_COLOURS)))
    for algorithm in ours:
        points = [(row.bytes, row.time_us) for row in rows if row.algorithm == algorithm]
        named = _STYLES.get(algorithm)
        colour, style = named if named else (next(colours), "-")
        width = 1.8 if algorithm in (*BASELINES, AUTO) else 1.2
        panel.loglog(
            *zip(*points, strict=True),
            style,
            color=colour,
            linewidth=width,
            marker=".",
            markersize=4,
            label=algorithm,
        )
    panel.set_title(name, fontsize=10)
    panel.set_xlabel("bytes", fontsize=8)
    panel.set_ylabel("time, us", fontsize=8)
    sizes = sorted({row.bytes for row in rows})
    ticks = sizes[:: 1 + len(sizes) // _MOST_TICKS]
    panel.set_xticks(ticks, [size_name(tick) for tick in ticks], fontsize=7, rotation=30)
    panel.minorticks_off()
    panel.grid(True, color="#e4e4e4", linewidth=0.6)
    panel.legend(loc="upper left", fontsize=7, frameon=False)
