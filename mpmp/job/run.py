"""A training run from its first line to its closing table."""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import mpmp
from mpmp import checkpoint
from mpmp.checkpoint.huggingface import copy_tokenizer
from mpmp.checkpoint.merged import metadata
from mpmp.comm.agreement import on_first
from mpmp.comm.mesh import Mesh
from mpmp.config import Config, config_hash, differences, to_dict
from mpmp.data.objective import Objective
from mpmp.errors import CheckpointError, NotFiniteError
from mpmp.job import setup, state
from mpmp.job.report import Metrics, Reporter, duration, table
from mpmp.job.shares import Shares, Stopwatch
from mpmp.job.task import READERS, Task
from mpmp.job.training import Step, Training
from mpmp.parallel.merge import digest, merge

_NAMES = {"gpt": "GPT", "llama": "LLaMA", "bert": "BERT", "mlp": "MLP"}


def train(config: Config) -> None:
    """Train as configured; returns on all ranks when the closing table was shown."""
    world = setup.begin(config)
    mesh = setup.make_mesh(config, world)
    task = READERS[config.task](config, mesh)
    folder = setup.run_folder(config, mesh)
    training = Training(state.with_saved_cut(config, folder, mesh), mesh, task.objective)
    Run(config, mesh, task, training, folder).all()


class Run:
    """One run: what it shows, writes and saves while the training steps are taken."""

    def __init__(
        self, config: Config, mesh: Mesh, task: Task, training: Training, folder: Path
    ) -> None:
        self.config, self.mesh, self.task, self.training = config, mesh, task, training
        self.fault = setup.fault_from_environment()
        self.folder, settings = folder, config.checkpoint
        self.saver = checkpoint.Saver(folder, mesh, settings.keep, background=settings.background)
        training.asked = self.saver.done
        self.show = Reporter(mesh.world.rank == 0, config.train.log_every)
        self.steps = _steps_of(config, task.objective)
        self.tokens = 0
        self.saved = self.validated = -1
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
            try:
                last, laps = self._steps(first)
            except NotFiniteError:  # on all ranks alike, which may have begun to save
                self._tell_saved(self.saver.finish())
                raise
            if self.validated != last:
                self._validate(last)
            if self.saved != last:
                self._save(last)
            self._tell_saved(self.saver.finish())
            self._export(last)
            self.task.finish(self.training, self.folder, last, self.show, self.metrics)
            self._close(last - first, laps)

    # --- the steps --------------------------------------------------------------------------------

    def _steps(self, first: int) -> tuple[int, list[Shares]]:
        """Take steps until they, or the minutes, are used up; the number of the next step."""
        train, save_every = self.config.train, self.config.checkpoint.every
        stopwatch, laps = Stopwatch(self.training), []
        self.training.began = time.perf_counter() - self.elapsed_s
        number = first
        while (self.steps is None or number < self.steps) and self.elapsed_s < train.limit_s:
            if self.fault is not None:
                self.fault.strike(self.mesh.world.rank, number)
            if self.steps is None:
                progress = self.elapsed_s / train.limit_s
            else:
                progress = number / self.steps
            step = self.training.step(number, progress)
            self.elapsed_s = step.elapsed_s
            if step.agreed:
                self._tell_saved(self.saver.settle())
            laps.append(stopwatch.lap())
            number += 1
            self._show_step(number, step, laps)
            if self._is_judged(number):
                self._validate(number)
                stopwatch.lap()
            if save_every and number % save_every == 0:
                self._save(number)
                stopwatch.lap()
        return number, laps

    def _show_step(self, number: int, step: Step, laps: list[Shares]) -> None:
        lap, tokens = laps[-1], self.task.objective.tokens(number - 1)
        self.tokens += tokens
        speed = tokens / lap.total_s
        left_s = self.config.train.limit_s - step.elapsed_s
        if self.steps is not None:
            recent = [one.total_s for one in laps[-100:]]
            left_s = min(left_s, sum(recent) / len(recent) * (self.steps - number))
        of = "" if self.steps is None else f"/{self.steps}"
        self.show.progress(
            number,
            f"step {number}{of}  loss {step.loss:.6f}  "
            f"{'overflow, skipped' if step.skipped else f'norm {step.norm:.3f}'}  "
            f"{speed:,.0f} tokens/s  communication {lap.part(lap.communication_s):.0%}  "
            f"bubble {lap.part(lap.bubble_s):.0%}  eta {duration(max(0.0, left_s))}",
            last=number == self.steps,
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

    def _is_judged(self, number: int) -> bool:
        """Whether a validation follows the step: every so many, or where an epoch has ended."""
        train, sequences = self.config.train, self.task.objective.sequences
        if train.eval_every or train.epochs is None:
            return train.eval_every > 0 and number % train.eval_every == 0
        return number * train.batch // sequences > (number - 1) * train.batch // sequences

    def _validate(self, number: int) -> None:
        said, values = self.task.validate(self.training)
        self.validated = number
        self.show.line(f"validation after step {number}: {said}")
        self.metrics.write(event="validation", step=number, **values)

    # --- what is kept -----------------------------------------------------------------------------

    def _resume(self) -> int:
        """The number of the first step to take: 0, or where the newest good checkpoint stands."""
        if not self.config.checkpoint.resume:
            return 0
        loaded = checkpoint.load(self.folder, self._wanted, self.mesh)
        state.filled(self.training, loaded.meta)
        self.saver.distrust(loaded.damaged)
        for line in loaded.skipped:
            self.show.line(line)
        self.saved, self.elapsed_s = loaded.step, float(loaded.meta.get("elapsed_s", 0.0))
        self.show.line(f"resumed from {loaded.path} after step {loaded.step}")
        changes = differences(loaded.meta.get("config", {}), to_dict(self.config))
        for setting, (old, new) in changes.items():
            if not setting.startswith("checkpoint."):
                self.show.line(f"changed since: {setting} from {old!r} to {new!r}")
        if loaded.meta.get("text_sha256") != self.task.sha256:
            self.show.line("changed since: the text; what was validated on may be learnt from now")
        return loaded.step

    def _wanted(self, found: checkpoint.Found) -> Sequence[checkpoint.Held]:
        """The tensors to be filled; CheckpointError where they are of another model."""
        changes = differences(found.meta.get("config", {}), to_dict(self.config))
        for setting, (old, new) in changes.items():
            if setting.startswith("model.") and setting != "model.weights":
                raise CheckpointError(
                    f"{found.path} holds another model: {setting} is {old!r} there and {new!r} "
                    "in this run; use the settings of the checkpoint"
                )
        for name, new in self.task.meta.items():
            if found.meta.get(name) != new:
                raise CheckpointError(
                    f"{found.path} is of another {self.config.task}: {name} is "
                    f"{found.meta.get(name)!r} there and {new!r} in this run; use its data"
                )
        return state.wanted(self.training, found)

    def _save(self, number: int) -> None:
        """Save, or begin to: in the background one save at a time is under way."""
        self._tell_saved(self.saver.finish())
        meta = {
            "config": to_dict(self.config),
            "text_sha256": self.task.sha256,
            "elapsed_s": self.elapsed_s,
            **state.meta(self.training),
            **self.task.meta,
        }
        self.saver.begin(number, state.held(self.training), meta)
        self.saved = number
        if not self.config.checkpoint.background:
            self._tell_saved(self.saver.finish())

    def _tell_saved(self, path: Path | None) -> None:
        """Say that a checkpoint is there, where one is."""
        if path is not None:
            self.show.line(f"saved {path}")
            self.metrics.write(event="checkpoint", step=self.saved, path=str(path))

    def _export(self, number: int) -> None:
        merged = merge(self.training.weights(), self.mesh)
        path = self.folder / "model.safetensors"
        said = metadata(number, {"config": to_dict(self.config), **self.task.meta})
        checkpoint.export(path, merged, said, self.mesh)
        sha256 = on_first("hash the model", lambda: digest(merged), self.mesh)
        self.show.line(f"merged model in {path}, weights sha256 {sha256[:16]}")

    # --- what is shown ----------------------------------------------------------------------------

    def _head(self) -> None:
        world = self.mesh.world
        pieces = self.training.pieces
        own = sum(piece.parameter.numel() for piece in pieces)
        counted = sum(piece.parameter.numel() for piece in pieces if piece.counts)
        whole = int(self.mesh.everyone.allreduce(torch.tensor([counted])))
        model = self.config.model
        # What was measured once may be cut otherwise next time; a resumed run needs the same.
        cut = f" cut {self.training.cut}" if self.config.parallel.cut == "measured" else ""
        sha256 = self._weights_sha256()
        said, values = self.task.head(self.training)
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
        self.show.line(said)
        for line in self.training.notes:
            self.show.line(line)
        on_first("write the tokenizer", self._write_tokenizer, self.mesh)
        self.show.line(f"run: {self.folder}")
        self.metrics.write(
            event="start",
            layout=self.mesh.layout,
            ranks=world.size,
            parameters=whole,
            weights_sha256=sha256,
            text_sha256=self.task.sha256,
            config_sha256=config_hash(self.config),
            **values,
        )

    def _write_tokenizer(self) -> None:
        """A run's folder has all that its model needs: the tokenizer, and what belongs to it."""
        given = self.config.data.tokenizer
        if given is not None and Path(given).name == "tokenizer.json":
            copy_tokenizer(Path(given).parent, self.folder)
        if self.task.tokenizer is not None:
            path = self.folder / "tokenizer.json"
            aside = path.with_suffix(".tmp")
            aside.write_text(self.task.tokenizer, encoding="utf-8")
            aside.replace(path)

    def _device(self) -> str:
        world = self.mesh.world
        if world.device.type == "cpu":
            return "cpu"
        return f"{torch.cuda.get_device_name(world.device)}, GPU tensors {world.gpu_path}"

    def _weights_sha256(self) -> str:
        merged = merge(self.training.weights(), self.mesh)
        return str(on_first("hash the model", lambda: digest(merged), self.mesh))

    def _close(self, steps: int, laps: list[Shares]) -> None:
        """The closing table: what every rank did with its time, and how even the load was."""
        world = self.mesh.world
        start, stop = self.training.rows
        own = {
            "tokens": self.tokens * (stop - start) / self.config.train.batch / self.mesh.model.size,
            "total_s": sum(lap.total_s for lap in laps),
            "communication_s": sum(lap.communication_s for lap in laps),
            "bubble_s": sum(lap.bubble_s for lap in laps),
            "memory_mb": _peak_memory_bytes(world.device) / 1e6,
        }
        ranks: list[dict[str, Any]] = [
            json.loads(one) for one in world.gather_texts(json.dumps(own))
        ]
        total_s = max(one["total_s"] for one in ranks)
        speed = self.tokens / total_s if total_s > 0 else 0.0
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


def _steps_of(config: Config, objective: Objective) -> int | None:
    """Steps of the run; None where its minutes alone decide."""
    train = config.train
    limits = [] if train.steps is None else [train.steps]
    if train.epochs is not None:
        limits.append(-(-train.epochs * objective.sequences // train.batch))
    return min(limits, default=None)


def _peak_memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
