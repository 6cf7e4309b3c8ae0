"""The bench of training: build both sides of a mode, let them take turns, show what was found."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from torch import Tensor

from mpmp.comm.mesh import Mesh
from mpmp.comm.world import World, start
from mpmp.config import Config
from mpmp.data.loader import Corpus
from mpmp.data.objective import LanguageObjective
from mpmp.errors import InputOutputError, VerifyError
from mpmp.job import setup
from mpmp.job.bench.baselines import gloo
from mpmp.job.bench.csv_file import write_csv
from mpmp.job.bench.train import theirs, turns
from mpmp.job.bench.train.layouts import config_of
from mpmp.job.bench.train.rows import LIMITS, Row, gap, shown
from mpmp.job.bench.train.settings import MODES, TrainSteps
from mpmp.job.bench.train.text import corpus
from mpmp.job.bench.train.turns import Contender
from mpmp.job.report import Reporter
from mpmp.job.training import Training
from mpmp.parallel.merge import merge

IDEAL, ALONE = "data/ideal", "tensor/one"
"""Rows beside those of the modes: what ours is held against besides its rival."""
AGAINST = {**MODES, IDEAL: "torch, alone on each rank", ALONE: "plain torch on one rank"}


def bench(settings: TrainSteps) -> None:
    """Measure the modes, print a table, and write the file that was asked for.

    Raises VerifyError where the losses of the two sides are not those of the same training.
    """
    world = start("cpu", settings.comm.timeout_s)
    settings.require_ranks(world.size)
    if world.rank == 0:
        _require_place(settings.csv)
    text = corpus(settings.vocabulary)
    setup.agree(world, f"text in {text.name}", text.sha256)
    lobby = Mesh.over(world, settings=settings.comm)
    report = Reporter(world.rank == 0, every=1)
    report.line(_head(settings, world))
    rows: list[Row] = []
    with gloo(world, len(set(lobby.everyone.hosts)) == 1):
        for mode in settings.names:
            rows += Session(settings, world, lobby, text, report).measure(mode)
    report.line("\n" + shown(rows, AGAINST))
    if settings.csv is not None and world.rank == 0:
        write_csv(settings.csv, Row, rows)
        report.line(f"{settings.csv}: {len(rows)} rows")
    lobby.free()
    limit = LIMITS[settings.dtype]
    for row in rows:
        if row.loss_gap > limit or (row.mode in MODES and row.loss_gap != row.loss_gap):
            raise VerifyError(
                f"mode {row.mode}: the losses of ours and of {AGAINST[row.mode]} differ by "
                f"{row.loss_gap:.1e} nats, more than {limit:.0e}: they are not the same training"
            )


class Session:
    """One mode's two sides."""

    def __init__(
        self, settings: TrainSteps, world: World, lobby: Mesh, text: Corpus, report: Reporter
    ) -> None:
        self.settings, self.world, self.lobby = settings, world, lobby
        self.text, self.report = text, report

    def measure(self, mode: str) -> list[Row]:
        """Both sides, and who is beside them, take their turns; the rows that follow."""
        settings, world = self.settings, self.world
        config = config_of(mode, settings, world.size)
        mesh = self._mesh(mode, config)
        objective = setup.make_objective(config, self.text)
        contenders = self._contenders(mode, config, mesh, objective)
        done = turns.take(
            contenders, self.lobby.everyone, world, settings.steps, settings.repeats + 1
        )
        for turn, one in done:
            name = f"turn {turn}/{settings.repeats}" if turn else "warm-up"
            self.report.progress(
                turn,
                f"  {mode} {name}: {one.name} {one.speeds[-1]:,.0f} tokens/s, "
                f"loss {one.losses[-1]:.3f}",
                last=False,
            )
        if mesh is not None and mode != "one":
            mesh.free()
        ours, *others = contenders
        return [
            Row.of(
                row,
                ours.speeds[1:],
                other.speeds[1:],
                float("nan") if row == IDEAL else gap(ours.losses, other.losses),
            )
            for row, other in zip(_rows_of(mode), others, strict=True)
        ]

    def _mesh(self, mode: str, config: Config) -> Mesh | None:
        """Where ours runs; None on a rank that has no part."""
        if mode != "one":
            return setup.make_mesh(config, self.world)
        return Mesh.single(self.world) if self.world.rank == 0 else None

    def _contenders(
        self, mode: str, config: Config, mesh: Mesh | None, objective: LanguageObjective
    ) -> list[Contender]:
        """Ours, theirs, and who is beside them, all with the weights of ours."""
        rank, ranks = self.world.rank, self.world.size
        training = None if mesh is None else Training(config, mesh, objective)
        merged = self._merged(training, mesh)
        tokens = config.train.batch * config.model.context
        makers = theirs.MAKERS
        alone = ranks == 1 or mode == "one"

        def ours(number: int) -> float:
            assert training is not None
            return training.step(number, 0.0).loss

        def their(maker: str, apart: bool) -> theirs.Step | None:
            """Their loop: on all ranks, or on rank 0 for itself."""
            if apart and rank != 0:
                return None
            return makers[maker](
                config, objective.batches, merged, *((0, 1) if apart else (rank, ranks))
            )

        found = [
            Contender("ours", None if training is None else ours, tokens),
            Contender(MODES[mode], their(mode, alone), tokens),
        ]
        if mode == "data":
            found.append(Contender(AGAINST[IDEAL], their("one", False), tokens))
        if mode == "tensor":
            found.append(Contender(AGAINST[ALONE], their("one", True), tokens))
        return found

    def _merged(self, training: Training | None, mesh: Mesh | None) -> dict[str, Tensor]:
        """The initial weights of ours, whole, on every rank of the world."""
        own: dict[str, Tensor] = {}
        if training is not None and mesh is not None:
            own = merge(training.weights(), mesh)
        table = json.dumps([(name, *one.shape) for name, one in own.items()])
        everyone, merged = self.lobby.everyone, {}
        for name, *shape in json.loads(self.world.gather_texts(table)[0]):
            merged[name] = everyone.broadcast(own.get(name, torch.empty(shape)).float())
        return merged


def _rows_of(mode: str) -> list[str]:
    """The rows of a mode's contenders but ours."""
    return [mode, *{"data": [IDEAL], "tensor": [ALONE]}.get(mode, [])]


def _head(settings: TrainSteps, world: World) -> str:
    return (
        f"{world.size} ranks on {world.host}, {world.threads} threads each, {world.library}, "
        f"torch {torch.__version__}\n"
        f"GPT of {settings.layers} layers, {settings.heads} heads, width {settings.width}, "
        f"vocabulary {settings.vocabulary}, context {settings.context}, microbatches of "
        f"{settings.batch} sequences, {settings.dtype}; {settings.repeats} turns of "
        f"{settings.steps} steps"
    )


def _require_place(path: str | None) -> None:
    """Refuse, before anything is measured, what could not be written afterwards."""
    if path is None:
        return
    folder = Path(path).resolve().parent
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise InputOutputError(f"{path} cannot be written: {folder} is no folder to write to")
    if Path(path).is_dir():
        raise InputOutputError(f"{path} cannot be written: it is a folder")
