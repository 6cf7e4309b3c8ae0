"""The task of a language model: text, baselines to beat, and a sample at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mpmp.comm.agreement import on_first
from mpmp.comm.mesh import Mesh
from mpmp.config import Config
from mpmp.data.baselines import Score, baselines, bits_per_byte
from mpmp.data.objective import LanguageObjective
from mpmp.job import setup
from mpmp.job.report import Metrics, Reporter
from mpmp.job.sample import sample
from mpmp.job.training import Training

_PROMPT = "def "


class LanguageTask:
    """A model that foretells each next token, or those that are masked; see Task."""

    def __init__(self, config: Config, mesh: Mesh) -> None:
        self.config, self.mesh = config, mesh
        self.corpus = setup.read_corpus(config, mesh.world)
        self.objective = self.asked(config)
        self.sha256 = self.corpus.sha256
        self.tokenizer = self.corpus.tokenizer.file
        self.baselines: dict[str, Score] = {}

    @property
    def meta(self) -> dict[str, Any]:
        return {}

    def asked(self, config: Config) -> LanguageObjective:
        return setup.make_objective(config, self.corpus)

    def head(self, training: Training) -> tuple[str, dict[str, Any]]:
        corpus = self.corpus
        found = on_first("score the baselines", self._score_baselines, self.mesh)
        self.baselines = {name: Score(*score) for name, score in found.items()}
        line = (
            f"text: {corpus.name}, {len(corpus.train):,} tokens to learn from, "
            f"{len(corpus.validation):,} to validate on, vocabulary {corpus.vocabulary}"
            + (f"; bits per byte to beat: {self._beside()}" if self.baselines else "")
        )
        return line, {"baselines": {name: score.bits for name, score in self.baselines.items()}}

    def validate(self, training: Training) -> tuple[str, dict[str, Any]]:
        nats = training.validate()
        if self.objective.masked:
            return f"{nats:.4f} nats per masked token", {"nats": nats}
        bits = bits_per_byte(nats, self.objective.batches)
        line = f"{nats:.4f} nats per token, {bits:.3f} bits per byte ({self._beside()})"
        return line, {"nats": nats, "bits_per_byte": bits}

    def finish(
        self, training: Training, folder: Path, number: int, show: Reporter, metrics: Metrics
    ) -> None:
        num_tokens = self.config.train.sample_tokens
        if num_tokens == 0 or self.objective.masked:
            return
        text = sample(training, self.corpus.tokenizer, _PROMPT, num_tokens, self.config.model.seed)
        show.line("sample:")
        for line in text.splitlines():
            show.line(f"    {line}")

    def _beside(self) -> str:
        return ", ".join(f"{name} {score.bits:.3f}" for name, score in self.baselines.items())

    def _score_baselines(self) -> dict[str, tuple[float, float]]:
        if self.objective.masked:  # they foretell the next token, which is not asked
            return {}
        found = baselines(self.objective.batches)
        return {name: (score.nats, score.bits) for name, score in found.items()}
