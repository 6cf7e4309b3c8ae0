"""A training run from its first line to its closing table."""

from __future__ import annotations

import json
import resource
import time
from typing import Any

import torch

import mpmp
from mpmp import checkpoint
from mpmp.comm.agreement import on_first
from mpmp.comm.mesh import Mesh
from mpmp.config import Config, config_hash, differences, to_dict
from mpmp.data.baselines import Score, baselines, bits_per_byte
from mpmp.errors import CheckpointError
from mpmp.job import setup
from mpmp.job.report import Metrics, Reporter, duration, table
from mpmp.job.sample import sample
from mpmp.job.shares import Shares, Stopwatch
from mpmp.job.training import Step, Training
from mpmp.parallel.merge import digest, merge

_PROMPT = "def "
_NAMES = {"gpt": "GPT", "llama": "LLaMA", "bert": "BERT", "mlp": "MLP"}


def train(config: Config) -> None:
    """Train as configured; returns on all ranks when the closing table was shown."""
    world = setup.begin(config)
    mesh = setup.make_mesh(config, world)
    batches = setup.read_batches(config, world)
    training = Training(config, mesh, batches)
    Run(config, mesh, training).all()


class Run:
    """One run: what it shows, writes and saves while the training steps are taken."""

    def __init__(self, config: Config, mesh: Mesh, training: Training) -> None:
        self.config, self.mesh, self.training = config, mesh, training
        self.fault = setup.fault_from_environment()
        self.folder = setup.run_folder(config, mesh)
        self.show = Reporter(mesh.world.rank == 0, config.train.log_every)
        self.tokens_per_step = config.train.batch * config.model.context
        self.saved = -1
        self.elapsed_s = 0.0

    def all(self) -> None:
        with checkpoint.locked(self.folder, self.mesh):
            first = self._resume()
            self.metrics = Metrics(
                self.folder / "metrics.jsonl",
                writes=self.mesh.world.rank == 0,
                resume_from=first if self.config.checkpoint.resume else None,
            )
            self._head()
            last, laps = self._steps(first)
            self._validate(last)
            if self.saved != last:
                self._save(last)
            self._export(last)
            self._sample()
            self._close(last - first, laps)

    # --- the steps --------------------------------------------------------------------------------

    def _steps(self, first: int) -> tuple[int, list[Shares]]:
        """Take steps until they, or the minutes, are used up; the number of the next step."""
        train, save_every = self.config.train, self.config.checkpoint.every
        stopwatch, laps = Stopwatch(self.training), []
        self.training.began = time.perf_counter() - self.elapsed_s
        number = first
        while (train.steps is None or number < train.steps) and self.elapsed_s < train.limit_s:
            if self.fault is not None:
                self.fault.strike(self.mesh.world.rank, number)
            if train.steps is None:
                progress = self.elapsed_s / train.limit_s
            else:
                progress = number / train.steps
            step = self.training.step(number, progress)
            self.elapsed_s = step.elapsed_s
            laps.append(stopwatch.lap())
            number += 1
            self._show_step(number, step, laps)
            if train.eval_every and number % train.eval_every == 0:
                self._validate(number)
                stopwatch.lap()
            if save_every and number % save_every == 0:
                self._save(number)
                stopwatch.lap()
        return number, laps

    def _show_step(self, number: int, step: Step, laps: list[Shares]) -> None:
        train, lap = self.config.train, laps[-1]
        speed = self.tokens_per_step / lap.total_s
        left_s = train.limit_s - step.elapsed_s
        if train.steps is not None:
            recent = [one.total_s for one in laps[-100:]]
            left_s = min(left_s, sum(recent) / len(recent) * (train.steps - number))
        of = "" if train.steps is None else f"/{train.steps}"
        self.show.progress(
            number,
            f"step {number}{of}  loss {step.loss:.6f}  "
            f"{'overflow, skipped' if step.skipped else f'norm {step.norm:.3f}'}  "
            f"{speed:,.0f} tokens/s  communication {lap.part(lap.communication_s):.0%}  "
            f"bubble {lap.part(lap.bubble_s):.0%}  eta {duration(max(0.0, left_s))}",
            last=number == train.steps,
        )
        self.metrics.write(
            event="step",
            step=number,
            loss=step.loss,
            norm=None if step.skipped else step.norm,
            learning_rate=step.rate,
            tokens_per_s=speed,
            communication=lap.part(lap.communication_s),
            bubble=lap.part(lap.bubble_s),
            elapsed_s=step.elapsed_s,
        )

    def _validate(self, number: int) -> None:
        nats = self.training.validate()
        if self.training.objective.masked:
            self.show.line(f"validation after step {number}: {nats:.4f} nats per masked token")
            self.metrics.write(event="validation", step=number, nats=nats)
            return
        bits = bits_per_byte(nats, self.training.batches)
        beside = ", ".join(f"{name} {score.bits:.3f}" for name, score in self.baselines.items())
        self.show.line(
            f"validation after step {number}: {nats:.4f} nats per token, "
            f"{bits:.3f} bits per byte ({beside})"
        )
        self.metrics.write(event="validation", step=number, nats=nats, bits_per_byte=bits)

    # --- what is kept -----------------------------------------------------------------------------

    def _resume(self) -> int:
        """The number of the first step to take: 0, or where the newest good checkpoint stands."""
        if not self.config.checkpoint.resume:
            return 0
        loaded = checkpoint.load(self.folder, self.mesh)
        for line in loaded.skipped:
            self.show.line(line)
        changes = differences(loaded.meta.get("config", {}), to_dict(self.config))
        for setting, (old, new) in changes.items():
            if setting.startswith("model."):
                raise CheckpointError(
                    f"{loaded.path} holds another model: {setting} is {old!r} there and {new!r} "
                    "in this run; use the settings of the checkpoint"
                )
        self.training.load_state(loaded.tensors)
        self.saved, self.elapsed_s = loaded.step, float(loaded.meta.get("elapsed_s", 0.0))
        self.show.line(f"resumed from {loaded.path} after step {loaded.step}")
        for setting, (old, new) in changes.items():
            if not setting.startswith("checkpoint."):
                self.show.line(f"changed since: {setting} from {old!r} to {new!r}")
        if loaded.meta.get("text_sha256") != self.training.batches.corpus.sha256:
            self.show.line("changed since: the text; what was validated on may be learnt from now")
        return loaded.step

    def _save(self, number: int) -> None:
        # Data order and dropout are functions of the step and of seeds among the settings.
        meta = {
            "config": to_dict(self.config),
            "text_sha256": self.training.batches.corpus.sha256,
            "elapsed_s": self.elapsed_s,
        }
        keep = self.config.checkpoint.keep
        path = checkpoint.save(self.folder, number, self.training.state(), meta, self.mesh, keep)
        self.saved = number
        self.show.line(f"saved {path}")
        self.metrics.write(event="checkpoint", step=number, path=str(path))

    def _export(self, number: int) -> None:
        merged = merge(self.training.weights(), self.mesh)
        path = self.folder / "model.safetensors"
        metadata = {"format": "pt", "mpmp": mpmp.__version__, "step": str(number)}
        checkpoint.export(path, merged, metadata, self.mesh)
        sha256 = on_first("hash the model", lambda: digest(merged), self.mesh)
        self.show.line(f"merged model in {path}, weights sha256 {sha256[:16]}")

    # --- what is shown ----------------------------------------------------------------------------

    def _head(self) -> None:
        world, corpus = self.mesh.world, self.training.batches.corpus
        pieces = self.training.pieces
        own = sum(piece.parameter.numel() for piece in pieces)
        counted = sum(piece.parameter.numel() for piece in pieces if piece.counts)
        whole = int(self.mesh.everyone.allreduce(torch.tensor([counted])))
        model = self.config.model
        # What was measured once may be cut otherwise next time; a resumed run needs the same.
        cut = f" cut {self.training.cut}" if self.config.parallel.cut == "measured" else ""
        sha256 = self._weights_sha256()
        found = on_first("score the baselines", self._score_baselines, self.mesh)
        self.baselines = {name: Score(*score) for name, score in found.items()}
        beside = ", ".join(f"{name} {score.bits:.3f}" for name, score in self.baselines.items())
        self.show.line(
            f"mpmp {mpmp.__version__}: {world.size} ranks, {world.ranks_on_host} on {world.host}, "
            f"{world.threads} threads each, {self.mesh.layout}, {world.library}, "
            f"torch {torch.__version__}, {self._device()}, {self.config.train.dtype}"
        )
        self.show.line(
            f"model: {_NAMES[model.kind]} of {whole:,} parameters ({own:,} on this rank), "
            f"{model.layers} layers{cut}, {model.heads} heads, width {model.width}, "
            f"context {model.context}, weights sha256 {sha256[:16]}"
        )
        self.show.line(
            f"text: {corpus.name}, {len(corpus.train):,} tokens to learn from, "
            f"{len(corpus.validation):,} to validate on, vocabulary {corpus.vocabulary}"
            + (f"; bits per byte to beat: {beside}" if beside else "")
        )
        self.show.line(f"run: {self.folder}")
        self.metrics.write(
            event="start",
            layout=self.mesh.layout,
            ranks=world.size,
            parameters=whole,
            weights_sha256=sha256,
            text_sha256=corpus.sha256,
            config_sha256=config_hash(self.config),
            baselines={name: score.bits for name, score in self.baselines.items()},
        )

    def _score_baselines(self) -> dict[str, tuple[float, float]]:
        if self.training.objective.masked:  # they foretell the next token, which is not asked
            return {}
        found = baselines(self.training.batches)
        return {name: (score.nats, score.bits) for name, score in found.items()}

    def _device(self) -> str:
        world = self.mesh.world
        if world.device.type == "cpu":
            return "cpu"
        return f"{torch.cuda.get_device_name(world.device)}, GPU tensors {world.gpu_path}"

    def _weights_sha256(self) -> str:
        merged = merge(self.training.weights(), self.mesh)
        return str(on_first("hash the model", lambda: digest(merged), self.mesh))

    def _sample(self) -> None:
        if self.config.train.sample_tokens == 0 or self.training.objective.masked:
            return
        text = sample(
            self.training, _PROMPT, self.config.train.sample_tokens, self.config.model.seed
        )
        self.show.line("sample:")
        for line in text.splitlines():
            self.show.line(f"    {line}")

    def _close(self, steps: int, laps: list[Shares]) -> None:
        """The closing table: what every rank did with its time, and how even the load was."""
        world = self.mesh.world
        start, stop = self.training.rows
        own = {
            "tokens": steps * (stop - start) * self.config.model.context / self.mesh.model.size,
            "total_s": sum(lap.total_s for lap in laps),
            "communication_s": sum(lap.communication_s for lap in laps),
            "bubble_s": sum(lap.bubble_s for lap in laps),
            "memory_mb": _peak_memory_bytes(world.device) / 1e6,
        }
        ranks: list[dict[str, Any]] = [
            json.loads(one) for one in world.gather_texts(json.dumps(own))
        ]
        total_s = max(one["total_s"] for one in ranks)
        speed = steps * self.tokens_per_step / total_s if total_s > 0 else 0.0
        shares = [Shares(one["total_s"], one["communication_s"], one["bubble_s"]) for one in ranks]
        computing = [one.compute_s for one in shares]
        mean = sum(computing) / len(computing)
        balance = max(computing) / mean if mean > 0 else 1.0
        rows = [
            [
                str(rank),
                f"{one['tokens'] / total_s if total_s > 0 else 0.0:,.0f}",
                f"{share.part(share.compute_s):.1%}",
                f"{share.part(share.communication_s):.1%}",
                f"{share.part(share.bubble_s):.1%}",
                f"{one['memory_mb']:,.0f}",
            ]
            for rank, (one, share) in enumerate(zip(ranks, shares, strict=True))
        ]
        self.show.line()
        self.show.line(
            table(["rank", "tokens/s", "compute", "communication", "bubble", "peak MB"], rows)
        )
        self.show.line(
            f"{speed:,.0f} tokens/s in all over {steps} steps in {total_s:.1f} s; "
            f"load balance L = max/avg of compute {balance:.3f}"
        )
        self.metrics.write(
            event="done", steps=steps, tokens_per_s=speed, balance=balance, ranks=ranks
        )


def _peak_memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
