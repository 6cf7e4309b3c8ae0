"""Continuing prompts on the ranks of one replica: a token a step, keys and values kept.

    batch 0   P0          D0          D0             P  all tokens of the prompts
    batch 1      P1          D1          D1          D  the token that was chosen last
    stages    0->1->..->last --tokens--> all         the last stage chooses and tells the others

There are as many batches as stages, where there are prompts enough, so that all stages work. The
tensor ranks of the last stage have the same logits, bit for bit, and choose alike; each tells the
ranks of its own pipeline. What ends a sequence follows from its tokens, so all ranks know.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mpmp import config, models
from mpmp.comm.mesh import Mesh
from mpmp.comm.transfer import Transfer
from mpmp.job.generation_text import Continuation
from mpmp.models.choice import Choice
from mpmp.models.stage import TransformerStage
from mpmp.parallel.borders import TAGS
from mpmp.parallel.cache import Cache
from mpmp.parallel.parts import parts
from mpmp.parallel.pipeline import Pipeline
from mpmp.parallel.recorder import now
from mpmp.parallel.stage import Microbatch
from mpmp.programs import schedules
from mpmp.programs.partition import partition

_CHOSEN_TAG = TAGS + 2
"""Of tokens that the last stage has chosen."""


_SCHEDULE = schedules.find("gpipe")
"""One stage a rank, in line."""


def stage_of(
    model: config.Model, vocabulary: int, mesh: Mesh, dtype: torch.dtype
) -> TransformerStage:
    """This rank's stage of a model in line; LayoutError where a rank would have none."""
    group = mesh.pipeline
    (part,) = parts(_SCHEDULE, group.rank, group.size, model.layers)
    return models.build(model, vocabulary, mesh, dtype, part)


def pipeline_of(stage: TransformerStage, mesh: Mesh) -> Pipeline:
    """The pipeline of stages in line."""
    return Pipeline(mesh, [stage], _SCHEDULE, nullcontext)


@dataclass(frozen=True)
class Speeds:
    """Tokens and seconds of one replica; the first token behind a prompt belongs to the prompt."""

    prompts: int
    prompt_tokens: int
    new_tokens: int
    prompt_s: float
    new_s: float


@dataclass(eq=False)
class _Batch:
    """Sequences that pass the stages together, and the token of each that is on its way."""

    rows: list[Continuation]
    cache: Cache
    chosen: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    transfers: list[Transfer] = field(default_factory=list)


class Generation:
    """Continues sequences with the stages of a pipeline; all ranks of a replica together."""

    def __init__(self, pipeline: Pipeline, mesh: Mesh) -> None:
        self.pipeline, self._device = pipeline, mesh.world.device

    def run(
        self,
        rows: Sequence[Continuation],
        choice: Choice,
        said: Callable[[Continuation], None] = lambda row: None,
    ) -> Speeds:
        """Continue all until they have ended; ``said`` is called for a row that has a new token."""
        stages = self.pipeline.group.size
        cuts = partition(len(rows), max(1, min(stages, len(rows))))
        batches = [self._batch(rows[start:stop]) for start, stop in cuts if stop > start]
        began = prompted = now(self._device)
        with torch.no_grad():
            for batch in batches:
                self._step(batch, [row.prompt for row in batch.rows], choice)
            for number in range(max((row.ends.tokens for row in rows), default=0)):
                for batch in batches:
                    self._take(batch, said)
                    if batch.rows:
                        self._step(batch, [row.tokens[-1:] for row in batch.rows], choice)
                batches = [batch for batch in batches if batch.rows]
                if number == 0:
                    prompted = now(self._device)
                if not batches:
                    break
        prompt_tokens = sum(len(row.prompt) for row in rows)
        new_tokens = sum(len(row.tokens) - 1 for row in rows)
        return Speeds(
            len(rows), prompt_tokens, new_tokens, prompted - began, now(self._device) - prompted
        )

    def _batch(self, rows: Sequence[Continuation]) -> _Batch:
        room = max(min(len(row) + row.ends.tokens, row.ends.context) for row in rows)
        return _Batch(list(rows), Cache(len(rows), room, self._device))

    def _step(self, batch: _Batch, fresh: Sequence[Sequence[int]], choice: Choice) -> None:
        """Pass fresh tokens of each row through all stages, and have the next ones chosen."""
        counts = [len(one) for one in fresh]
        t, cache = max(counts), batch.cache
        cache.begin(counts)
        padded = [[*one, *[0] * (t - len(one))] for one in fresh]
        inputs_Bt = torch.tensor(padded, device=self._device)
        microbatch = Microbatch(inputs_Bt, inputs_Bt, None, cache.positions, t, cache=cache)
        hidden, group = self.pipeline.hidden(microbatch), self.pipeline.group
        if hidden is None:
            batch.chosen = torch.empty(len(counts), dtype=torch.int64)
            batch.transfers = [group.receive(batch.chosen, self.pipeline.last_rank, _CHOSEN_TAG)]
            return
        last = self.pipeline.last
        assert isinstance(last, TransformerStage)
        with self.pipeline.context():
            logits_BV = last.logits_at(hidden, microbatch, [count - 1 for count in counts])
        numbers, places = [row.number for row in batch.rows], [len(row) for row in batch.rows]
        batch.chosen = choice.next(logits_BV, numbers, places).cpu()
        others = [rank for rank in range(group.size) if rank != group.rank]
        batch.transfers = [group.send(batch.chosen, rank, _CHOSEN_TAG) for rank in others]

    def _take(self, batch: _Batch, said: Callable[[Continuation], None]) -> None:
        """Each row gets its token; those that have ended leave the batch."""
        for transfer in batch.transfers:
            transfer.wait()
        for row, token in zip(batch.rows, batch.chosen.tolist(), strict=True):
            row.add(token)
            said(row)
        stay = [number for number, row in enumerate(batch.rows) if not row.ended]
        if len(stay) < len(batch.rows):
            batch.rows = [batch.rows[number] for number in stay]
            batch.cache.keep(stay)
