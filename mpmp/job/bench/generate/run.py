"""The bench of generation: both sides continue the same prompt in turns, on one rank."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from mpmp.comm.mesh import Mesh
from mpmp.comm.world import World, start
from mpmp.data.tokens import ByteTokenizer
from mpmp.errors import LayoutError, VerifyError
from mpmp.job.bench.csv_file import write_csv
from mpmp.job.bench.generate import theirs
from mpmp.job.bench.generate.rows import Row, shown
from mpmp.job.bench.generate.settings import SIZES, GenerateTokens, Size
from mpmp.job.generation import Generation, pipeline_of, stage_of
from mpmp.job.generation_text import Continuation, Ends
from mpmp.job.report import Reporter
from mpmp.models.choice import Choice
from mpmp.models.stage import TransformerStage
from mpmp.parallel.merge import merge
from mpmp.parallel.placement import placed_parameters
from mpmp.parallel.tensor import lay_by_columns


def bench(settings: GenerateTokens) -> None:
    """Measure the models, print a table, and write the file that was asked for.

    Raises VerifyError where the two sides do not say the same tokens.
    """
    world = start("cpu")
    if world.size > 1:
        raise LayoutError(
            f"bench generate compares one rank with one process, and {world.size} ranks were "
            "started; use one"
        )
    torch.set_num_threads(settings.threads)
    report = Reporter(True, every=1)
    report.line(
        f"{world.host}, {settings.threads} threads, torch {torch.__version__}, float32; "
        f"{settings.tokens} tokens behind {settings.prompt}, {settings.repeats} pairs of turns"
    )
    rows = [measure(name, SIZES[name], settings, world, report) for name in settings.names]
    report.line("\n" + shown(rows, settings.against))
    if settings.csv is not None:
        write_csv(settings.csv, Row, rows)
        report.line(f"{settings.csv}: {len(rows)} rows")


def measure(name: str, size: Size, settings: GenerateTokens, world: World, report: Reporter) -> Row:
    """One model's turns."""
    mesh = Mesh.single(world)
    stage = stage_of(size.model, size.vocabulary, mesh, torch.float32)
    weights = {where.name: (where, one.detach()) for where, one in placed_parameters(stage)}
    sides = {"ours": _ours(size, mesh, stage)}
    if settings.against != "nothing":
        sides[settings.against] = theirs.make(size, merge(weights, mesh))
    lay_by_columns(stage)
    stage.settle()
    prompt = [(7 * place + 3) % size.vocabulary for place in range(settings.prompt)]
    speeds: dict[str, list[float]] = {side: [] for side in sides}
    for turn in range(settings.repeats + 1):
        said = {}
        for side, tokens_behind in sides.items():
            began = time.perf_counter()
            said[side] = tokens_behind(prompt, settings.tokens)
            speed = settings.tokens / (time.perf_counter() - began)
            if turn:
                speeds[side].append(speed)
            report.line(f"  {name} turn {turn}: {side} {speed:,.1f} tokens/s")
        _require_same(name, said)
    ours, *others = speeds.values()
    return Row.of(name, ours, others[0] if others else ())


def _ours(size: Size, mesh: Mesh, stage: TransformerStage) -> theirs.Continue:
    generation = Generation(pipeline_of(stage, mesh), mesh)

    def tokens_behind(prompt: Sequence[int], count: int) -> list[int]:
        row = Continuation(0, prompt, ByteTokenizer(), Ends(count, size.model.context))
        with torch.inference_mode():
            generation.run([row], Choice())
        return row.tokens

    return tokens_behind


def _require_same(name: str, said: dict[str, list[int]]) -> None:
    (ours, first), *others = said.items()
    for other, tokens in others:
        if tokens != first:
            at = next(
                n for n, (one, two) in enumerate(zip(first, tokens, strict=True)) if one != two
            )
            raise VerifyError(
                f"{name}: token {at + 1} is {first[at]} by {ours} and {tokens[at]} by {other}: "
                "they do not run the same model"
            )
