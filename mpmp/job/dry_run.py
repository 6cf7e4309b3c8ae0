"""A dry run: the layout of a world of any size, built and stepped through in one process.

    every rank   builds its part of the model on tensors that have a shape and no memory
    one of each kind of rank  takes a whole step: its actions, layers, buckets and optimiser

It is the code that trains, over groups that carry nothing and count what they are given; so what is
shown is what a run would hold and send. Ranks are alike if they hold the same shapes at the same
place of the pipeline. A sum counts 2 (p-1)/p of its bytes, the least that any algorithm sends;
experts are taken to be asked evenly. The library's own memory and that of Python come on top.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mpmp.checkpoint import huggingface
from mpmp.comm.imagined import groups_of, imagined
from mpmp.comm.mesh import Mesh, fit, layout_of
from mpmp.config import Config
from mpmp.data import wordpiece
from mpmp.data.objective import Sequences
from mpmp.data.tagging import tags_of
from mpmp.data.tokens import tokenizer_of
from mpmp.errors import ConfigError
from mpmp.job.beginning import vocabulary_of
from mpmp.job.report import Reporter, table
from mpmp.job.tagging import read_files
from mpmp.job.training import Training
from mpmp.parallel.memory import Living


@dataclass(frozen=True)
class Told:
    """What one kind of rank holds and sends; bytes, the sent ones by the axes they cross."""

    parameters: int
    states: int
    """Weights, gradients, optimiser states and the memories they pass through."""
    peak: int
    """The most that lives at once in a step, states and inputs among it."""
    sent: dict[str, float]


@dataclass(frozen=True)
class Kind:
    """Ranks that are alike."""

    ranks: tuple[int, ...]
    place: str
    told: Told


def dry_run(config: Config, ranks: int | None) -> list[Kind]:
    """Show what every rank of a world would hold and send in a step; omitted, the layout's world.

    Raises LayoutError or ConfigError for what could not be trained.
    """
    show = Reporter(True, every=1)
    config, layout = _laid_out(config, ranks)
    asked = _asked(config)
    # Nothing is read into weights that are not there.
    config = replace(config, model=replace(config.model, weights=None))
    alike: dict[tuple[object, ...], list[int]] = defaultdict(list)
    first: dict[tuple[object, ...], Mesh] = {}
    for mesh in imagined(layout, "cpu"):
        key = _kind(config, mesh, asked)
        alike[key].append(mesh.world.rank)
        first.setdefault(key, mesh)
    kinds: list[Kind] = []
    for number, (key, mesh) in enumerate(first.items(), 1):
        show.progress(number, f"kind of rank {number}/{len(first)}", last=number == len(first))
        kinds.append(Kind(tuple(alike[key]), _place(mesh), _step(config, mesh, asked)))
    for line in _shown(config, layout, kinds, asked.vocabulary):
        show.line(line)
    return kinds


def _laid_out(config: Config, ranks: int | None) -> tuple[Config, str]:
    """The configuration and the name of its layout in a world of that many ranks."""
    parallel = config.parallel
    if parallel.cut == "measured":
        raise ConfigError(
            "parallel.cut measured times layers, and those of a dry run take no time; give numbers "
            "of layers, as in 3,3,2"
        )
    axes = parallel.axes
    if ranks is None:
        inner = parallel.pipeline * parallel.context * parallel.tensor
        ranks = (parallel.data or parallel.expert) * inner
    sizes = fit(ranks, **axes)
    return (
        replace(config, parallel=replace(parallel, data=sizes["data"] * sizes["expert"])),
        layout_of(sizes, parallel.zero, parallel.sequence),
    )


@dataclass
class Nothing:
    """An objective without data: whole sequences of nothing; see Objective."""

    vocabulary: int
    tags: int
    context: int
    sequences: int
    validation_batches: int = 1

    def training(self, step: int, start: int, stop: int) -> Sequences:
        nothing = torch.zeros(stop - start, self.context, dtype=torch.int64)
        return Sequences(nothing, nothing, torch.arange(start, stop))

    def validation(self, index: int) -> Sequences:
        return self.training(0, 0, self.sequences)

    def counted(self, step: int) -> int:
        return self.sequences * self.context

    def tokens(self, step: int) -> int:
        return self.counted(step)

    def scored(self) -> int:
        return self.counted(0)


def _asked(config: Config) -> Nothing:
    """As many tokens and tags as the tokenizer and the text have."""
    if config.task == "tagging":
        train = read_files(config)["train"]
        weights = config.model.weights
        described = None if weights is None else huggingface.describe(weights)
        tags = len((described.tags if described else ()) or tags_of(train))
        if config.data.tokenizer is None:
            words = [word for one in train.sentences for word in one.words]
            learnt = wordpiece.learn(words, config.data.vocabulary)
            tokens = wordpiece.WordPieces(learnt, "the learnt tokenizer").vocabulary
        else:
            tokens = tokenizer_of(os.path.expanduser(config.data.tokenizer)).vocabulary
    else:
        tokenizer = tokenizer_of(config.data.tokenizer)
        # Words are masked by a token more where the tokenizer has none for it.
        masks = config.model.kind == "bert" and tokenizer.mask is None
        tags, tokens = 0, tokenizer.vocabulary + masks
    vocabulary = vocabulary_of(config.model, tokens)
    return Nothing(vocabulary, tags, config.model.context, config.train.batch)


@contextmanager
def _without_memory() -> Iterator[None]:
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def _kind(config: Config, mesh: Mesh, asked: Nothing) -> tuple[object, ...]:
    """What ranks have in common if they hold and send the same."""
    with _without_memory():
        training = Training(config, mesh, asked)
    shapes = tuple(tuple(one.shape) for stage in training.stages for one in stage.parameters())
    pieces = tuple(piece.stop - piece.start for piece in training.pieces)
    start, stop = training.rows
    return mesh.index["pipeline"], mesh.index["context"], shapes, pieces, stop - start


def _step(config: Config, mesh: Mesh, asked: Nothing) -> Told:
    """One step of a rank. The optimiser's states, made at its end, are there in all later ones."""
    with _without_memory(), Living() as living:
        training = Training(config, mesh, asked)
        living.most_bytes = living.bytes  # not what building the weights took
        training.backward(0, asked.counted(0))
        peak, before = living.most_bytes, living.bytes
        training.optimizer.step()
        made = living.bytes - before
        training.sharded.step_done()
        states = living.bytes
    parameters = sum({one: one.numel() for s in training.stages for one in s.parameters()}.values())
    sent: dict[str, float] = defaultdict(float)
    for group in groups_of(mesh):
        if group.sent_bytes:  # of the same axes there may be two: the ends of a pipeline are one
            sent["+".join(group.axes)] += group.sent_bytes
    return Told(parameters, states, peak + made, dict(sent))


# --- what is shown --------------------------------------------------------------------------------


def _place(mesh: Mesh) -> str:
    several = [axis for axis, size in mesh.sizes.items() if size > 1 and axis != "data"]
    return " ".join(f"{axis} {mesh.index[axis]}" for axis in several) or "all"


def _shown(config: Config, layout: str, kinds: list[Kind], vocabulary: int) -> Iterator[str]:
    world = sum(len(kind.ranks) for kind in kinds)
    model, train = config.model, config.train
    yield (
        f"dry run of {layout} on {world} ranks: {model.kind} of {model.layers} layers, "
        f"{model.heads} heads, width {model.width}, context {model.context}, "
        f"vocabulary {vocabulary}, {train.batch} sequences a step, {train.dtype}"
    )
    axes = sorted({axis for kind in kinds for axis in kind.told.sent})
    head = ["ranks", "first at", "parameters", "states MB", "peak MB"]
    rows = [
        [
            _ranges(kind.ranks),
            kind.place,
            f"{kind.told.parameters:,}",
            f"{kind.told.states / 1e6:,.1f}",
            f"{kind.told.peak / 1e6:,.1f}",
            *(f"{kind.told.sent.get(axis, 0.0) / 1e6:,.2f}" for axis in axes),
        ]
        for kind in kinds
    ]
    yield table([*head, *(f"{axis} MB/step" for axis in axes)], rows)
    worst = max(kinds, key=lambda kind: kind.told.peak)
    yield (
        f"most memory: {worst.told.peak / 1e6:,.1f} MB on rank {worst.ranks[0]}; all ranks send "
        f"{sum(len(k.ranks) * sum(k.told.sent.values()) for k in kinds) / 1e6:,.1f} MB a step"
    )


def _ranges(ranks: Iterable[int]) -> str:
    """``0-3,8`` for 0, 1, 2, 3, 8."""
    found: list[list[int]] = []
    for rank in ranks:
        if found and rank == found[-1][1] + 1:
            found[-1][1] = rank
        else:
            found.append([rank, rank])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in found)
