"""The task of entity tagging: CoNLL files, F1 after each epoch, a report and predictions.

words and tags -> word pieces -> windows -> BERT -> a tag for each word -> entities
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mpmp import checkpoint
from mpmp.checkpoint import huggingface
from mpmp.comm.agreement import on_first
from mpmp.comm.mesh import Mesh
from mpmp.config import Config
from mpmp.data import conll, generated, wordpiece
from mpmp.data.entities import AVERAGES, MICRO, Score, report
from mpmp.data.tagging import TaggedWindows, TaggingObjective, require_context, tags_of
from mpmp.errors import ConfigError, InputOutputError
from mpmp.job import setup
from mpmp.job.report import Metrics, Reporter, table
from mpmp.job.training import Training


@dataclass(frozen=True)
class Judged:
    """A split as the model sees it: loss per word, tags in IOB2, the scores of its entities."""

    nats: float
    tags: list[tuple[str, ...]]
    scores: dict[str, Score]


class TaggingTask:
    """Token classification of words that the tags of their entities are known of; see Task."""

    def __init__(self, config: Config, mesh: Mesh) -> None:
        self.config, self.mesh = config, mesh
        self.files = read_files(config)
        self.tags = self._known_tags() or tags_of(self.files["train"])
        self.tokenizer, source = on_first("read the word pieces", self._read_pieces, mesh)
        self.pieces = wordpiece.WordPieces(self.tokenizer, source)
        self.splits = self._cut(config.model.context)
        self.objective = self.asked(config)
        self.sha256 = _sha256(self.splits)
        setup.agree(mesh.world, f"sentences in {config.data.path}", self.sha256)
        self.judged: dict[str, Judged] = {}

    @property
    def meta(self) -> dict[str, Any]:
        sha256 = hashlib.sha256(self.tokenizer.encode()).hexdigest()
        return {"tags": self.tags, "tokenizer_sha256": sha256}

    def asked(self, config: Config) -> TaggingObjective:
        context = config.model.context
        splits = self.splits if context == self.config.model.context else self._cut(context)
        return TaggingObjective(
            splits["train"],
            splits["validation"],
            self.pieces,
            self.tags,
            context=context,
            batch=config.train.batch,
            seed=config.data.seed,
        )

    def head(self, training: Training) -> tuple[str, dict[str, Any]]:
        counts = {
            name: f"{len(one.sentences):,} sentences of {one.num_words:,} words"
            + (" (IOB1, converted)" if one.converted else "")
            for name, one in self.files.items()
        }
        train, source = self.splits["train"], self.config.data.path or "made-up sentences"
        line = (
            f"text: {source}, {counts['train']} in {len(train.windows):,} sequences to learn "
            f"from, {counts['validation']} to validate on"
            + (f", {counts['test']} to test on" if "test" in counts else "")
            + f"; {self.objective.vocabulary:,} word pieces; entities: "
            + ", ".join(conll.kinds(self.files["train"].sentences))
        )
        return line, {"tags": self.tags, "sequences": len(train.windows)}

    def validate(self, training: Training) -> tuple[str, dict[str, Any]]:
        found = self.judged["validation"] = self._judge(training, "validation")
        micro = found.scores[MICRO]
        line = (
            f"{found.nats:.4f} nats per word, entities: precision {micro.precision:.4f}, "
            f"recall {micro.recall:.4f}, F1 {micro.f1:.4f}"
        )
        values = {"nats": found.nats} | {
            name: getattr(micro, name) for name in ("precision", "recall", "f1")
        }
        return line, values

    def finish(
        self, training: Training, folder: Path, number: int, show: Reporter, metrics: Metrics
    ) -> None:
        if "test" in self.splits:
            self.judged["test"] = self._judge(training, "test")
        for name, found in self.judged.items():
            path = folder / f"{name}.predicted.conll"
            sentences, tags = self.files[name].sentences, found.tags
            on_first(f"write {path}", partial(conll.write, path, sentences, tags), self.mesh)
            show.line()
            show.line(f"{name}: {found.nats:.4f} nats per word, predictions in {path}")
            show.line(_table(found.scores))
            values = {kind: dataclasses.asdict(score) for kind, score in found.scores.items()}
            metrics.write(event="report", step=number, split=name, nats=found.nats, entities=values)

    def _judge(self, training: Training, name: str) -> Judged:
        """What the model makes of a split, the same on every rank."""
        split, sentences = self.splits[name], self.files[name].sentences
        nats, found = predict(training, self.objective, split)
        words = iter(found)
        tags = [conll.in_iob2([self.tags[next(words)] for _ in one.words]) for one in sentences]
        return Judged(nats, tags, report((one.tags for one in sentences), tags))

    def _known_tags(self) -> list[str]:
        """The tags, in order, of the model that the run goes on with or begins from; or none."""
        settings, weights = self.config.checkpoint, self.config.model.weights
        if settings.resume:
            found = checkpoint.newest(Path(settings.dir or ""), self.mesh)
            return [str(tag) for tag in found.meta.get("tags", ())]
        described = huggingface.describe(weights) if weights is not None else None
        return list(described.tags) if described is not None else []

    def _cut(self, context: int) -> dict[str, TaggedWindows]:
        """Every split as windows of at most so many pieces."""
        require_context(context)
        return {
            name: TaggedWindows(one, self.pieces, self.tags, context)
            for name, one in self.files.items()
        }

    def _read_pieces(self) -> tuple[str, str]:
        """The text of the tokenizer's file, given or learnt from the training split; its name."""
        path = _tokenizer_file(self.config)
        if path is None:
            words = [word for one in self.files["train"].sentences for word in one.words]
            return wordpiece.learn(words, self.config.data.vocabulary), "the learnt tokenizer"
        try:
            return path.read_text(encoding="utf-8"), f"the tokenizer {path}"
        except (OSError, UnicodeDecodeError) as error:
            raise InputOutputError(f"the tokenizer {path} cannot be read: {error}") from None


@torch.no_grad()
def predict(
    training: Training, objective: TaggingObjective, split: TaggedWindows
) -> tuple[float, list[int]]:
    """Mean loss in nats, and the number of the likeliest tag, of each word of a split.

    Replicas take batches in turn; the same on every rank.
    """
    mesh, device = training.mesh, training.mesh.world.device
    found = torch.zeros(len(split.tags), dtype=torch.int64, device=device)
    total = torch.zeros((), dtype=torch.float64, device=device)
    batches = objective.batches(split)
    with training.sharded.whole():
        for first in range(0, batches, mesh.data.size):
            # All take as many: the last ones may have nothing of their own to do.
            index = min(first + mesh.replica, batches - 1)
            rows, words_BT = objective.batch(split, index)
            microbatch = training.own(rows, False)
            scored = training.pipeline.scored(microbatch)
            if scored is None or mesh.tensor.rank != 0 or first + mesh.replica >= batches:
                continue
            losses_Bt, logits_BtV = scored
            words_Bt = words_BT.to(device)[:, microbatch.positions_t]
            asked = words_Bt >= 0
            found[words_Bt[asked]] = logits_BtV.argmax(-1)[asked]
            total += losses_Bt.double().sum()
    # One rank has told each word's tag, and the others add nothing.
    total = mesh.everyone.allreduce(total)
    return float(total) / len(split.tags), mesh.everyone.allreduce(found).tolist()


def read_files(config: Config) -> dict[str, conll.Tagged]:
    """The sentences of each split that the settings name."""
    data = config.data
    if data.path is None:
        if data.validation or data.test:
            raise ConfigError(
                "data.validation and data.test name files beside the training file; name that, "
                "too, by --data.path"
            )
        return generated.generate()
    path = os.path.expanduser(data.path)
    if os.path.isdir(path):
        if data.validation or data.test:
            raise ConfigError(
                f"data.path {data.path!r} is a folder, whose files are found by their names; "
                "leave out data.validation and data.test, or give the training file as data.path"
            )
        files = conll.find(path)
    else:
        if data.validation is None:
            raise ConfigError(
                f"data.path {data.path!r} is no folder; name the other files, too, by "
                "--data.validation and --data.test"
            )
        files = {"train": path, "validation": data.validation}
        files |= {"test": data.test} if data.test else {}
    return {name: conll.read(os.path.expanduser(file)) for name, file in files.items()}


def _tokenizer_file(config: Config) -> Path | None:
    """Where the word pieces come from; None: they are learnt."""
    saved = Path(config.checkpoint.dir or "", "tokenizer.json")
    if config.checkpoint.resume and saved.is_file():
        return saved
    if config.data.tokenizer is not None:
        return Path(os.path.expanduser(config.data.tokenizer))
    if config.model.weights is not None:
        return Path(os.path.expanduser(config.model.weights), "tokenizer.json")
    return None


def _sha256(splits: dict[str, TaggedWindows]) -> str:
    """Of all pieces and tags, split by split: what all ranks must agree on."""
    digest = hashlib.sha256()
    for split in splits.values():
        digest.update(split.tags.tobytes())
        for window in split.windows:
            digest.update(window.pieces.tobytes() + window.words.tobytes())
    return digest.hexdigest()


def _table(scores: dict[str, Score]) -> str:
    names = ("precision", "recall", "f1")
    rows = [
        [kind, *(f"{getattr(score, name):.4f}" for name in names), f"{score.support:,}"]
        for kind, score in sorted(scores.items(), key=lambda item: item[0] in AVERAGES)
    ]
    return table(["entity", "precision", "recall", "F1", "support"], rows)
