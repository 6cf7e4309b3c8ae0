"""Every setting, documented once.

Sections are frozen dataclasses; each part of mpmp is given its own section only. A recipe (TOML)
and the command line fill them (see ``commands.py``); names of algorithms and schedules are
checked by the tables that own them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass, field
from math import isfinite
from typing import Any, Literal

from mpmp.errors import ConfigError


def _require(holds: bool, sentence: str) -> None:
    if not holds:
        raise ConfigError(sentence)


def _require_finite(section: str, settings: object) -> None:
    for name, value in vars(settings).items():
        if isinstance(value, float):
            _require(isfinite(value), f"{section}.{name} must be a finite number, not {value}")


@dataclass(frozen=True)
class Parallel:
    """How the model is laid out over the ranks; the product of the axes is the world."""

    data: int | None = None
    """Replicas of the model; omitted: the world divided by the other axes."""
    pipeline: int = 1
    """Stages the layers are cut into."""
    tensor: int = 1
    """Ranks that share each layer's heads, hidden units and vocabulary."""
    microbatches: int | None = None
    """Pieces of a replica's batch; omitted: twice the stages, or one without a pipeline."""
    schedule: str = "1f1b"
    """Order of a stage's forward and backward actions: gpipe or 1f1b."""
    bucket_mb: float = 4.0
    """Size at which a bucket of gradients is full and may be reduced, in MB."""

    def __post_init__(self) -> None:
        _require_finite("parallel", self)
        for name in ("data", "pipeline", "tensor", "microbatches"):
            value = getattr(self, name)
            _require(
                value is None or value >= 1, f"parallel.{name} must be at least 1, not {value}"
            )
        _require(self.bucket_mb > 0, f"parallel.bucket_mb must be positive, not {self.bucket_mb}")

    def num_microbatches(self, rows: int) -> int:
        """Microbatches of a replica that has at least ``rows`` sequences of each batch."""
        if self.microbatches is not None:
            return self.microbatches
        return 1 if self.pipeline == 1 else max(1, min(2 * self.pipeline, rows))


@dataclass(frozen=True)
class Comm:
    """How bytes travel."""

    allreduce: str = "auto"
    """Algorithm of every allreduce: auto, or a name from the table of programs."""
    reduce_scatter: str = "auto"
    """Algorithm of every reduce-scatter."""
    allgather: str = "auto"
    """Algorithm of every allgather."""
    broadcast: str = "auto"
    """Algorithm of every broadcast."""
    reduce: str = "auto"
    """Algorithm of every reduce."""
    gather: str = "auto"
    """Algorithm of every gather."""
    scatter: str = "auto"
    """Algorithm of every scatter."""
    alltoall: str = "auto"
    """Algorithm of every all-to-all."""
    barrier: str = "auto"
    """Algorithm of every barrier."""
    windows: Literal["auto", "on", "off"] = "auto"
    """Memory shared by the ranks of a host: where there is room, demanded, or never."""
    table: str | None = None
    """File of measurements, by bench, that auto chooses by; omitted: published thresholds."""
    explain: bool = False
    """Say, once for each new plan, which algorithm was taken and why."""
    timeout_s: float = 600.0
    """Seconds a rank waits for a peer before the job is ended with code 76."""

    def __post_init__(self) -> None:
        _require_finite("comm", self)
        _require(self.timeout_s > 0, f"comm.timeout_s must be positive, not {self.timeout_s}")


@dataclass(frozen=True)
class Model:
    """Shape of the GPT."""

    layers: int = 4
    heads: int = 4
    width: int = 192
    """Features of a token between the blocks; a multiple of the heads."""
    context: int = 128
    """Tokens a sequence has."""
    dropout: float = 0.0
    """Probability that an activation (an attention weight, too) is dropped in training."""
    tied: bool = True
    """The output layer uses the embedding's weights."""
    seed: int = 1
    """Key of the initial weights and of the dropout masks."""

    def __post_init__(self) -> None:
        _require_finite("model", self)
        for name in ("layers", "heads", "width", "context"):
            value = getattr(self, name)
            _require(value >= 1, f"model.{name} must be at least 1, not {value}")
        _require(
            self.width % self.heads == 0,
            f"model.width {self.width} must be a multiple of model.heads {self.heads}",
        )
        _require(0 <= self.dropout < 1, f"model.dropout must lie in [0, 1), not {self.dropout}")


@dataclass(frozen=True)
class Data:
    """What is learnt from."""

    path: str | None = None
    """A text file or a folder; omitted: the source of Python's standard library."""
    tokenizer: str | None = None
    """A tokenizer file of Hugging Face tokenizers; omitted: bytes and one end-of-text token."""
    seed: int = 1
    """Key of the order in which windows are visited."""


@dataclass(frozen=True)
class Optimizer:
    """AdamW with a warm-up, a cosine and a clipped gradient norm."""

    learning_rate: float = 2e-3
    """Highest learning rate."""
    final_fraction: float = 0.1
    """Learning rate at the end, as a fraction of the highest."""
    warmup_steps: int = 100
    """Steps in which the learning rate climbs; in steps, for a slow machine needs as many."""
    weight_decay: float = 0.1
    """Decay of weights with two or more dims; biases and norms have none."""
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float = 1.0
    """Global gradient norm above which gradients are scaled down; 0 never clips."""

    def __post_init__(self) -> None:
        _require_finite("optimizer", self)
        rate = self.learning_rate
        _require(0 < rate < float("inf"), f"optimizer.learning_rate must be positive, not {rate}")
        fraction = self.final_fraction
        _require(0 <= fraction <= 1, f"optimizer.final_fraction must lie in [0, 1], not {fraction}")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            _require(0 <= value < 1, f"optimizer.{name} must lie in [0, 1), not {value}")
        for name in ("weight_decay", "clip", "warmup_steps"):
            value = getattr(self, name)
            _require(value >= 0, f"optimizer.{name} must not be negative, not {value}")


@dataclass(frozen=True)
class Train:
    """How long, how much at once, in which precision, and what is written down."""

    steps: int | None = None
    """Optimiser steps; omitted: as many as fit into the minutes."""
    minutes: float | None = None
    """Training time, resumptions counted in; omitted: 3 without steps, else no limit."""
    batch: int = 16
    """Sequences of a step, over all ranks."""
    dtype: Literal["float32", "float64", "bfloat16"] = "float32"
    """Arithmetic: bfloat16 keeps weights in float32 and computes products in bfloat16."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where tensors live; auto takes a GPU where there is one."""
    log_every: int = 10
    """Steps between two lines of a log."""
    eval_every: int = 0
    """Steps between two validations; 0 validates at the end only."""
    eval_batches: int = 40
    """Batches of a validation."""
    sample_tokens: int = 200
    """Tokens of the sample shown at the end; 0 shows none."""

    def __post_init__(self) -> None:
        _require_finite("train", self)
        for name in ("batch", "log_every", "eval_batches"):
            value = getattr(self, name)
            _require(value >= 1, f"train.{name} must be at least 1, not {value}")
        for name in ("eval_every", "sample_tokens"):
            value = getattr(self, name)
            _require(value >= 0, f"train.{name} must not be negative, not {value}")
        _require(
            self.steps is None or self.steps >= 1,
            f"train.steps must be at least 1, not {self.steps}",
        )
        _require(
            self.minutes is None or self.minutes > 0,
            f"train.minutes must be positive, not {self.minutes}",
        )

    @property
    def limit_s(self) -> float:
        """Seconds after which training ends."""
        if self.minutes is not None:
            return 60 * self.minutes
        return 180.0 if self.steps is None else float("inf")


@dataclass(frozen=True)
class Checkpoint:
    """What is saved."""

    dir: str | None = None
    """Folder of the run (metrics, checkpoints, the merged model); omitted: runs/ and the time."""
    every: int = 0
    """Steps between two checkpoints; 0 saves at the end only."""
    keep: int = 2
    """Checkpoints that are kept."""
    resume: bool = False
    """Go on from the newest good checkpoint of the folder."""

    def __post_init__(self) -> None:
        _require(self.every >= 0, f"checkpoint.every must not be negative, not {self.every}")
        _require(self.keep >= 1, f"checkpoint.keep must be at least 1, not {self.keep}")
        _require(self.dir != "", "checkpoint.dir must name a folder")
        _require(
            not self.resume or self.dir is not None,
            "checkpoint.resume needs checkpoint.dir, the folder of the run that goes on",
        )


@dataclass(frozen=True)
class Config:
    """All settings of a run."""

    parallel: Parallel = field(default_factory=Parallel)
    comm: Comm = field(default_factory=Comm)
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    optimizer: Optimizer = field(default_factory=Optimizer)
    train: Train = field(default_factory=Train)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)


def to_dict(config: Config) -> dict[str, Any]:
    return dataclasses.asdict(config)


def config_hash(config: Config) -> str:
    """SHA-256 of all settings, the same for equal configurations on any machine."""
    return hashlib.sha256(json.dumps(to_dict(config), sort_keys=True).encode()).hexdigest()


def differences(
    old: dict[str, Any], new: dict[str, Any], prefix: str = ""
) -> dict[str, tuple[Any, Any]]:
    """Settings that two configurations (as dicts) do not share, by their full names."""
    found: dict[str, tuple[Any, Any]] = {}
    for key in {**old, **new}:
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            found |= differences(before, after, f"{prefix}{key}.")
        elif before != after:
            found[prefix + key] = (before, after)
    return found


# --- layout strings ---------------------------------------------------------------------------

AXES = ("data", "pipeline", "tensor")
"""Axes of the mesh, outermost first: neighbouring ranks share a tensor group."""
_SHORT = {"dp": "data", "pp": "pipeline", "tp": "tensor"}


def parse_layout(text: str) -> dict[str, int]:
    """``"dp2.tp2"`` as ``{"data": 2, "pipeline": 1, "tensor": 2}``; a missing dp is left out."""
    sizes = {"pipeline": 1, "tensor": 1}
    seen: set[str] = set()
    for part in text.split("."):
        match = re.fullmatch(r"(dp|pp|tp)([1-9][0-9]*)", part)
        if match is None or match[1] in seen:
            raise ConfigError(
                f"layout {text!r} is not understood at {part!r}; "
                "write dp2.pp2.tp2, each at most once"
            )
        seen.add(match[1])
        sizes[_SHORT[match[1]]] = int(match[2])
    return sizes


def layout_name(data: int, pipeline: int, tensor: int) -> str:
    """``dp2.pp1.tp2``"""
    return f"dp{data}.pp{pipeline}.tp{tensor}"
