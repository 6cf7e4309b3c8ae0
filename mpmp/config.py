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
    """Ranks the layers are cut over."""
    context: int = 1
    """Ranks that share each sequence."""
    tensor: int = 1
    """Ranks that share each layer's heads, hidden units and vocabulary."""
    expert: int = 1
    """Replicas, of those of the data axis, that share the experts; divides data."""
    zero: Literal[0, 1, 2, 3] = 0
    """What replicas share out: 1 optimiser states, 2 gradients, too, 3 weights, too."""
    sequence: bool = False
    """Between cut layers the ranks of a tensor group hold pieces of the sequences."""
    attention: Literal["ring", "ulysses"] = "ring"
    """How ranks that share a sequence attend: keys travel, or heads are exchanged."""
    microbatches: int | None = None
    """Pieces of a replica's batch; omitted: twice the stages, or one without a pipeline."""
    schedule: str = "1f1b"
    """Order of a rank's forward and backward actions: a name, NAME:fact=value,.., or FILE.csv."""
    cut: str = "even"
    """Layers of each stage: even, measured (by their cost), or by hand, as in 3,3,2."""
    bucket_mb: float | None = None
    """Size at which a bucket of gradients is full and may be reduced, in MB; omitted: 4, between
    hosts a twentieth of the gradients, from 0.5 to 4."""

    def __post_init__(self) -> None:
        _require_finite("parallel", self)
        for name in ("data", "pipeline", "context", "tensor", "expert", "microbatches"):
            value = getattr(self, name)
            _require(
                value is None or value >= 1, f"parallel.{name} must be at least 1, not {value}"
            )
        _require(
            self.bucket_mb is None or self.bucket_mb > 0,
            f"parallel.bucket_mb must be positive, not {self.bucket_mb}",
        )
        _require(
            self.data is None or self.data % self.expert == 0,
            f"parallel.expert {self.expert} must divide parallel.data {self.data}",
        )
        _require(
            self.cut in ("even", "measured")
            or re.fullmatch(r"[0-9]+(,[0-9]+)*", self.cut) is not None,
            "parallel.cut must be even, measured or numbers of layers as in 3,3,2, "
            f"not {self.cut!r}",
        )

    @property
    def axes(self) -> dict[str, Any]:
        """The axes that make the layout."""
        names = ("data", "pipeline", "context", "tensor", "expert")
        return {name: getattr(self, name) for name in names}

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
    overlap: Literal["auto", "on", "off"] = "auto"
    """Sums and gathers of cut layers beside their products: where each rank has its own host,
    wherever ranks send messages, or never."""
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
    """Shape of the model."""

    kind: Literal["gpt", "llama", "bert", "mlp"] = "gpt"
    """gpt; llama (RoPE, RMSNorm, SwiGLU); bert (masked words); mlp (two layers, of textbooks)."""
    layers: int = 4
    heads: int = 4
    kv_heads: int | None = None
    """Heads of keys and values, each used by several query heads; omitted: as many as heads."""
    width: int = 192
    """Features of a token between the blocks; a multiple of the heads."""
    hidden: int | None = None
    """Hidden units of a feed-forward; omitted: 4 width (llama: 8/3 width, in multiples of 32)."""
    context: int = 128
    """Tokens a sequence has."""
    dropout: float = 0.0
    """Probability that an activation (an attention weight, too) is dropped in training."""
    tied: bool = True
    """The output layer uses the embedding's weights."""
    vocabulary: int | None = None
    """Rows of the embedding; omitted: as many as the tokenizer has tokens."""
    token_types: int = 2
    """Vectors of which bert adds one to each token; text is of the first type."""
    norm_eps: float = 1e-5
    """Added to the variance that a norm divides by."""
    rope_base: float = 10_000.0
    """Angles of llama's positions: that of pair i is position x rope_base ** (-2 i / head)."""
    experts: int = 0
    """Feed-forwards of each block, of which a token takes the top_k best; 0: one for all."""
    top_k: int = 2
    """Experts that each token goes to."""
    capacity: float = 0.0
    """Most tokens of a sequence that an expert takes, over the even share; 0 drops none."""
    balance: float = 1e-2
    """Weight of the auxiliary loss that spreads tokens over the experts."""
    seed: int = 1
    """Key of the initial weights and of the dropout masks."""
    weights: str | None = None
    """A Hugging Face folder, or a merged model.safetensors, whose weights a run begins from."""

    def __post_init__(self) -> None:
        _require_finite("model", self)
        counts = ("layers", "heads", "width", "context", "kv_heads", "hidden", "top_k")
        for name in (*counts, "vocabulary", "token_types"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"model.{name} must be at least 1, not {value}")
        for name in ("norm_eps", "rope_base"):
            value = getattr(self, name)
            _require(value > 0, f"model.{name} must be positive, not {value}")
        for name in ("experts", "capacity", "balance"):
            value = getattr(self, name)
            _require(value >= 0, f"model.{name} must not be negative, not {value}")
        _require(
            self.width % self.heads == 0,
            f"model.width {self.width} must be a multiple of model.heads {self.heads}",
        )
        _require(
            self.heads % self.num_kv_heads == 0,
            f"model.heads {self.heads} must be a multiple of model.kv_heads {self.kv_heads}",
        )
        _require(
            self.kind != "llama" or self.width // self.heads % 2 == 0,
            f"llama turns pairs of features: model.width / model.heads must be even, "
            f"not {self.width // self.heads}",
        )
        _require(
            self.experts == 0 or self.top_k <= self.experts,
            f"model.top_k {self.top_k} must not exceed model.experts {self.experts}",
        )
        _require(0 <= self.dropout < 1, f"model.dropout must lie in [0, 1), not {self.dropout}")

    @property
    def num_kv_heads(self) -> int:
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def num_hidden(self) -> int:
        """Hidden units of a feed-forward."""
        if self.hidden is not None:
            return self.hidden
        return 4 * self.width if self.kind != "llama" else -(-8 * self.width // 96) * 32


@dataclass(frozen=True)
class Data:
    """What is learnt from."""

    path: str | None = None
    """Text file or folder (tagging: CoNLL files); omitted: Python's library (made-up sentences)."""
    validation: str | None = None
    """Tagging: the CoNLL file to validate on, where the path is the file to learn from."""
    test: str | None = None
    """Tagging: the CoNLL file to test on, where the path is the file to learn from."""
    tokenizer: str | None = None
    """File of Hugging Face tokenizers; omitted: bytes and end-of-text (tagging: learnt pieces)."""
    vocabulary: int = 1000
    """Tagging: word pieces learnt from the training split, where no tokenizer is given."""
    seed: int = 1
    """Key of the order in which windows are visited."""
    shortest: int | None = None
    """Sequences are cut to lengths drawn from here up to the context; omitted: all are whole."""

    def __post_init__(self) -> None:
        _require(
            self.shortest is None or self.shortest >= 1,
            f"data.shortest must be at least 1, not {self.shortest}",
        )
        _require(self.vocabulary >= 1, f"data.vocabulary must be at least 1, not {self.vocabulary}")


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
    """Most optimiser steps; omitted: those of the epochs, or as many as fit into the minutes."""
    epochs: int | None = None
    """Most visits of each sequence of the training split."""
    minutes: float | None = None
    """Training time, resumptions counted in; omitted: 3 without steps and epochs, else no limit."""
    batch: int = 16
    """Sequences of a step, over all ranks."""
    dtype: Literal["float32", "float64", "bfloat16", "float16"] = "float32"
    """Arithmetic: 16 bits keep weights and sums in float32 and compute products in 16 bits."""
    recompute: Literal["none", "selective", "full"] = "none"
    """What backward computes again to save memory: nothing, attention, or whole blocks."""
    compile: bool = False
    """Blocks go through torch.compile."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where tensors live; auto takes a GPU where there is one."""
    log_every: int = 10
    """Steps between two lines of a log."""
    eval_every: int = 0
    """Steps between two validations; 0 validates at the end, and of each epoch where set."""
    eval_batches: int = 40
    """Batches of a validation; tagging reads every sentence."""
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
            self.epochs is None or self.epochs >= 1,
            f"train.epochs must be at least 1, not {self.epochs}",
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
        return 180.0 if self.steps is None and self.epochs is None else float("inf")


@dataclass(frozen=True)
class Checkpoint:
    """What is saved."""

    dir: str | None = None
    """Folder of the run (metrics, checkpoints, the merged model); omitted: runs/ and the time."""
    every: int = 0
    """Steps between two checkpoints; 0 saves at the end only."""
    keep: int = 2
    """Checkpoints that are kept."""
    background: bool = True
    """Steps go on while a checkpoint is written, from a copy that takes as much memory again."""
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

    task: Literal["language", "tagging"] = "language"
    """What is learnt: to foretell tokens of text, or to tag the words of CoNLL files."""
    parallel: Parallel = field(default_factory=Parallel)
    comm: Comm = field(default_factory=Comm)
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    optimizer: Optimizer = field(default_factory=Optimizer)
    train: Train = field(default_factory=Train)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)

    def __post_init__(self) -> None:
        _require(
            self.task != "tagging" or self.model.kind == "bert",
            f"task tagging takes model.kind bert, which sees both sides of a word, "
            f"not {self.model.kind}",
        )
        _require(
            self.task != "tagging" or self.data.shortest is None,
            "data.shortest cuts text, but task tagging keeps every word; leave it out",
        )


TASKS = {
    "language": Config(),
    "tagging": Config(
        task="tagging",
        model=Model(kind="bert", layers=2, width=128, dropout=0.1),
        optimizer=Optimizer(learning_rate=1e-3, warmup_steps=20, weight_decay=0.01, beta2=0.999),
        train=Train(epochs=5, batch=32),
    ),
}
"""What a task begins with, before a recipe and flags."""


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

AXES = ("data", "expert", "pipeline", "context", "tensor")
"""Axes of the mesh, outermost first: neighbouring ranks share a tensor group."""
_SIZES = {"dp": "data", "pp": "pipeline", "cp": "context", "tp": "tensor", "ep": "expert"}
_EXAMPLE = "write dp2.pp2.cp2.tp2.ep2.zero1.sp, each at most once"


def parse_layout(text: str) -> dict[str, Any]:
    """``"dp2.tp2.sp"`` as settings of the parallel section; a missing dp is left out."""
    found: dict[str, Any] = {"pipeline": 1, "context": 1, "tensor": 1, "expert": 1}
    found |= {"zero": 0, "sequence": False}
    seen: set[str] = set()
    for part in text.split("."):
        match = re.fullmatch(r"(dp|pp|cp|tp|ep)([1-9][0-9]*)|(zero)([0-3])|(sp)", part)
        word = match and (match[1] or match[3] or match[5])
        if match is None or word in seen:
            raise ConfigError(f"layout {text!r} is not understood at {part!r}; {_EXAMPLE}")
        seen.add(str(word))
        if match[1]:
            found[_SIZES[match[1]]] = int(match[2])
        elif match[3]:
            found["zero"] = int(match[4])
        else:
            found["sequence"] = True
    return found


def layout_name(
    data: int,
    pipeline: int = 1,
    context: int = 1,
    tensor: int = 1,
    expert: int = 1,
    zero: int = 0,
    sequence: bool = False,
) -> str:
    """``dp2.pp1.tp2``; context, expert, zero and sp are named where they are used."""
    words = [f"dp{data}", f"pp{pipeline}"]
    words += [f"cp{context}"] if context > 1 else []
    words += [f"tp{tensor}"]
    words += [f"ep{expert}"] if expert > 1 else []
    words += [f"zero{zero}"] if zero else []
    return ".".join(words + (["sp"] if sequence else []))
