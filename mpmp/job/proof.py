"""What verify proves of a number of ranks: layouts, schedules, models, uneven cases, combined.

A row is a layout and the settings that make it special. Every row is trained for some steps on all
ranks and in one process; the table in the docs is written by the run that proves it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mpmp.config import TASKS, Config, Data, layout_name, parse_layout
from mpmp.job.compare import Comparison
from mpmp.programs.partition import factorisations
from mpmp.programs.schedules import SCHEDULES


@dataclass(frozen=True)
class Row:
    """A layout, and settings by their full names."""

    layout: str
    settings: dict[str, Any] = field(default_factory=dict)
    task: Literal["language", "tagging"] = "language"

    def __str__(self) -> str:
        task = [] if self.task == "language" else [f"task={self.task}"]
        said = (f"{name.partition('.')[2]}={value}" for name, value in self.settings.items())
        return " ".join((self.layout, *task, *said))

    def of(self, base: Config) -> Config:
        """The configuration of the row; another task than that of ``base`` has data of its own."""
        if self.task != base.task:
            model = dataclasses.replace(base.model, kind=TASKS[self.task].model.kind)
            data = Data(seed=base.data.seed)
            base = dataclasses.replace(base, task=self.task, model=model, data=data)
        axes = {"data": None} | parse_layout(self.layout)
        changes: dict[str, dict[str, Any]] = {"parallel": axes}
        for name, value in self.settings.items():
            section, _, key = name.partition(".")
            changes.setdefault(section, {})[key] = value
        sections = {
            section: dataclasses.replace(getattr(base, section), **values)
            for section, values in changes.items()
        }
        return dataclasses.replace(base, **sections)


def factored(world: int, base: Config, tags: int = 0) -> list[Row]:
    """Every factorisation of the ranks over data, pipeline, context, tensor the model allows.

    ``tags`` are those that a classifier tells apart; 0 where tokens are foretold.
    """
    model = base.model
    return [
        Row(layout_name(data, pipeline, context, tensor), task=base.task)
        for data, pipeline, context, tensor in factorisations(world, 4)
        if pipeline <= model.layers and tensor <= min(model.heads, tags or model.heads)
    ]


def suite(world: int, base: Config) -> Iterator[Row]:
    """Every row that is proved of ``world`` ranks: of all tasks, or of tagging alone."""
    if base.task == "language":
        yield from factored(world, base)
        yield from _schedules(world)
        yield from _states(world)
        yield from _models(world)
        yield from _uneven(world)
        yield from _combined(world)
    yield from _tagging(world)


def _schedules(world: int) -> Iterator[Row]:
    for name in SCHEDULES:
        for pipeline in (2, 4):
            if world % pipeline == 0:
                settings = {"parallel.schedule": name, "parallel.microbatches": 4}
                yield Row(layout_name(world // pipeline, pipeline), settings)


def _states(world: int) -> Iterator[Row]:
    for zero in (1, 2, 3):
        yield Row(layout_name(world, zero=zero))
        if world % 2 == 0:
            yield Row(layout_name(world // 2, tensor=2, zero=zero), {"parallel.microbatches": 2})
        if world % 4 == 0:
            yield Row(layout_name(world // 4, pipeline=2, context=2, zero=zero))


def _models(world: int) -> Iterator[Row]:
    for kind in ("llama", "bert", "mlp"):
        chosen = {"model.kind": kind}
        yield Row(layout_name(1, tensor=world), chosen)
        if world % 2 == 0:
            yield Row(layout_name(world // 2, pipeline=2), chosen)
            yield Row(layout_name(world // 2, context=2), chosen)
        if world % 4 == 0:
            yield Row(layout_name(world // 4, context=2, tensor=2, sequence=True), chosen)
    experts = {"model.experts": 4, "model.top_k": 2}
    for expert in (2, 4):
        if world % expert == 0:
            yield Row(layout_name(world, expert=expert), experts)
            yield Row(layout_name(world, expert=expert), experts | {"model.capacity": 1.0})
    if world % 4 == 0:
        yield Row(layout_name(world // 2, tensor=2, expert=2), experts)
        yield Row(layout_name(2, tensor=2, context=world // 4, expert=2, sequence=True), experts)
        yield Row(layout_name(2, pipeline=world // 2, expert=2), experts)
        yield Row(layout_name(world // 2, context=2, expert=2, zero=2), experts)
        split = {"parallel.schedule": "zb_v"}
        yield Row(layout_name(world // 2, 2, expert=2), experts | split)
        again = {"train.recompute": "full"}
        yield Row(layout_name(world // 2, 2, expert=2, zero=3), experts | split | again)


def _uneven(world: int) -> Iterator[Row]:
    short = {"data.shortest": 5, "train.batch": 2 * world + 3}
    yield Row(layout_name(world), short)
    if world % 2 == 0:
        yield Row(layout_name(world // 2, pipeline=2), short | {"parallel.microbatches": 2})
        yield Row(layout_name(world // 2, context=2), short | {"model.context": 13})
        yield Row(layout_name(1, context=2, tensor=world // 2), {"model.context": 13})
        bert = short | {"model.kind": "bert", "model.context": 13}
        yield Row(layout_name(world // 2, context=2), bert)
        yield Row(layout_name(world // 2, context=2), bert | {"parallel.attention": "ulysses"})
    for tensor in (3, 4):
        if world % tensor == 0:
            few = {"model.heads": 4, "model.kv_heads": 2}
            yield Row(layout_name(world // tensor, tensor=tensor), few)
            yield Row(layout_name(world // tensor, tensor=tensor, sequence=True), few)


def _combined(world: int) -> Iterator[Row]:
    if world > 1:
        yield Row(layout_name(1, context=world), {"parallel.attention": "ulysses"})
        yield Row(layout_name(1, tensor=world, sequence=True))
        yield Row(layout_name(1, tensor=world), {"model.tied": False})
        # Large enough for what moves beside products to be cut into pieces.
        large = {"model.context": 64, "train.batch": 32}
        messages = {"comm.windows": "off", "comm.overlap": "on"}
        for sequence in (False, True):
            yield Row(layout_name(1, tensor=world, sequence=sequence), messages | large)
    for recompute in ("selective", "full"):
        yield Row(layout_name(1, tensor=world), {"train.recompute": recompute})
    if world % 2 == 0:
        yield Row(layout_name(world // 2, pipeline=2), {"train.recompute": "full"})
        yield Row(layout_name(world // 2, pipeline=2), {"parallel.cut": "5,3"})
    if world % 8 == 0:
        for schedule in ("1f1b", "zb_h1"):
            yield Row("dp2.pp2.cp1.tp2.zero1.sp", {"parallel.schedule": schedule})
        ulysses = {"parallel.attention": "ulysses", "model.kind": "llama", "model.kv_heads": 4}
        yield Row("dp1.pp2.cp2.tp2.sp", ulysses)


def _tagging(world: int) -> Iterator[Row]:
    """Words and their tags; every tensor rank has some of seven tags and of eight heads."""
    tensor = max(ranks for ranks in (1, 2, 3, 4) if world % ranks == 0)
    layouts = [layout_name(world, zero=zero) for zero in (1, 2, 3)]
    layouts += [layout_name(1, pipeline=world), layout_name(world // tensor, tensor=tensor)]
    if tensor > 1:
        layouts.append(layout_name(world // tensor, tensor=tensor, sequence=True))
    if world % 4 == 0:
        layouts.append(layout_name(world // 4, pipeline=2, tensor=2, zero=1))
        layouts.append(layout_name(1, pipeline=world // 4, context=2, tensor=2, sequence=True))
    yield from (Row(layout, task="tagging") for layout in dict.fromkeys(layouts))
    # Sentences are padded to the longest; some replicas, and the last microbatches, have fewer.
    uneven = {"train.batch": 3 * world - 1, "model.context": 29}
    for layout, name, value in (
        (layout_name(world), "microbatches", 2),
        (layout_name(1, pipeline=world), "schedule", "zb_h1"),
        (layout_name(1, context=world), "attention", "ring"),
        (layout_name(1, context=world), "attention", "ulysses"),
    ):
        yield Row(layout, uneven | {f"parallel.{name}": value}, "tagging")


# --- the table ------------------------------------------------------------------------------------

_HEAD = """# What is proved

Each row was trained for some steps in float64 on all ranks and in one process, with the same
weights and batches. The figures are the largest errors, max|a-b| / max(max|b|, 1e-3 x the largest
max|b| of its kind); at most {limit:.0e} passes. Written by `mpirun -n N python -m mpmp.verify
--suite --table docs/verified.md`.
"""


def write_table(path: Path, world: int, results: dict[str, Comparison], limit: float) -> None:
    """Put the rows of ``world`` ranks into the file, beside those of other numbers of ranks."""
    kinds = list(next(iter(results.values())).worst)
    lines = [f"## {world} ranks", "", "| layout | " + " | ".join(kinds) + " |"]
    lines.append("|---|" + "---|" * len(kinds))
    for name, result in results.items():
        errors = (f"{result.worst[kind][0]:.1e}" for kind in kinds)
        lines.append(f"| {name} | " + " | ".join(errors) + " |")
    sections = {f"## {world} ranks": "\n".join(lines) + "\n"}
    if path.exists():
        for part in path.read_text(encoding="utf-8").split("\n## ")[1:]:
            title = "## " + part.partition("\n")[0]
            sections.setdefault(title, f"## {part.rstrip()}\n")
    ordered = sorted(sections, key=lambda title: int(title.split()[1]))
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "\n".join([_HEAD.format(limit=limit), *(sections[title] for title in ordered)])
    path.write_text(text, encoding="utf-8")
