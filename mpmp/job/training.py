"""One training step, and what it needs, built from a configuration on a mesh.

    rows of the global batch -> microbatches -> pipeline (forward, backward, buckets summed)
        -> global norm, clip -> optimiser on own shards -> one small sum of metrics

train and verify take the same step; nothing here knows which of them it serves.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from math import isfinite

import torch
from torch import Tensor

from mpmp.comm.mesh import Mesh
from mpmp.config import Config
from mpmp.data.loader import Batches
from mpmp.errors import CheckpointError, LayoutError, NotFiniteError
from mpmp.models.gpt import GPTStage
from mpmp.optim.adamw import learning_rate, make_optimizer
from mpmp.optim.clip import clip_, global_norm
from mpmp.parallel.data import GradientBuckets
from mpmp.parallel.pipeline import Microbatch, Pipeline
from mpmp.parallel.placement import Placement, placed_parameters
from mpmp.programs.partition import partition

Shards = dict[str, tuple[Placement, Tensor]]
"""This rank's shards by global name."""


@dataclass(frozen=True)
class Step:
    """What all ranks know of a step: the loss in nats per token, the gradient norm, the rate."""

    loss: float
    norm: float
    rate: float
    elapsed_s: float
    """Seconds since training began, as rank 0 measured them."""


class Training:
    """The shard of the model, optimiser and data that one rank has, and the step they take."""

    def __init__(self, config: Config, mesh: Mesh, batches: Batches) -> None:
        self.config, self.mesh, self.batches = config, mesh, batches
        self.rows, self.cuts = _cut_batch(config, mesh)
        dtype = torch.float64 if config.train.dtype == "float64" else torch.float32
        self.stage = GPTStage(config.model, batches.corpus.vocabulary, mesh, dtype)
        self.parameters = [parameter for _, parameter in placed_parameters(self.stage)]
        self.buckets = GradientBuckets(self.parameters, mesh, config.parallel.bucket_mb * 1e6)
        self.optimizer = make_optimizer(self.parameters, config.optimizer)
        self.pipeline = Pipeline(
            mesh, self.stage, config.parallel.schedule, _arithmetic(config, mesh)
        )
        self.began = time.perf_counter()

    def step(self, number: int, progress: float) -> Step:
        """Take optimiser step ``number``; ``progress`` in [0, 1] sets the learning rate.

        Raises NotFiniteError on every rank alike where loss or norm is not finite; no weight has
        changed then.
        """
        train = self.config.train
        loss = self.pipeline.train(
            self._microbatches(number), train.batch * self.config.model.context, self.buckets
        )
        norm = global_norm(self.parameters, self.mesh.model)
        total, elapsed_s = self._agree(loss)
        if not (isfinite(total) and isfinite(float(norm))):
            raise NotFiniteError(
                f"step {number}: the loss is {total} and the gradient norm {float(norm)}; "
                "lower --optimizer.learning-rate or use --train.dtype float32"
            )
        clip_(self.parameters, norm, self.config.optimizer.clip)
        rate = learning_rate(self.config.optimizer, number, progress)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        return Step(total, float(norm), rate, elapsed_s)

    def validate(self) -> float:
        """Mean loss over the validation, nats per token, the same on every rank."""
        device, mesh = self.mesh.world.device, self.mesh
        total = torch.zeros((), dtype=torch.float64, device=device)
        # Replicas take batches in turn.
        for index in range(mesh.index["data"], self.batches.validation_batches, mesh.data.size):
            inputs, targets = self.batches.validation(index)
            total += self.pipeline.score(inputs.to(device), targets.to(device))
        counted = total if mesh.tensor.rank == 0 else torch.zeros_like(total)
        return float(mesh.everyone.allreduce(counted)) / self.batches.scored_tokens

    def weights(self) -> Shards:
        """This rank's shard of each weight."""
        return {place.name: (place, one.detach()) for place, one in placed_parameters(self.stage)}

    def gradients(self) -> Shards:
        """This rank's shard of each gradient, summed over replicas (and clipped) after a step."""
        shards: Shards = {}
        for place, one in placed_parameters(self.stage):
            assert one.grad is not None
            shards[place.name] = (place, one.grad)
        return shards

    def state(self) -> dict[str, Tensor]:
        """Everything a checkpoint must hold of this rank: weights and optimiser state."""
        state: dict[str, Tensor] = {}
        for place, one in placed_parameters(self.stage):
            state[f"weight/{place.name}"] = one.detach()
            for key, value in self.optimizer.state.get(one, {}).items():
                state[f"{key}/{place.name}"] = value
        return state

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take back what :meth:`state` gave, bit for bit; CheckpointError where it does not fit."""
        with torch.no_grad():
            for place, one in placed_parameters(self.stage):
                saved = state.get(f"weight/{place.name}")
                if saved is None or saved.shape != one.shape or saved.dtype != one.dtype:
                    there = "no such tensor" if saved is None else _kind(saved)
                    raise CheckpointError(
                        f"the checkpoint is of another model: {place.name} is {_kind(one)} in this "
                        f"run and {there} there; use its vocabulary, model and dtype"
                    )
                one.copy_(saved)
                moments = {}
                for key in ("step", "exp_avg", "exp_avg_sq"):
                    value = state[f"{key}/{place.name}"]
                    moments[key] = value if key == "step" else value.to(one.device)
                self.optimizer.state[one] = moments

    def _microbatches(self, number: int) -> list[Microbatch]:
        device, (start, stop) = self.mesh.world.device, self.rows
        inputs, targets = self.batches.batch(number, start, stop)
        first = number * self.config.train.batch + start
        samples = torch.arange(first, first + stop - start)
        return [
            Microbatch(*(one[low:high].to(device) for one in (inputs, targets, samples)))
            for low, high in self.cuts
        ]

    def _agree(self, loss: Tensor) -> tuple[float, float]:
        """The loss over all replicas, and rank 0's clock, on every rank."""
        metrics = torch.zeros(2, dtype=torch.float64)
        if self.mesh.is_last_stage and self.mesh.tensor.rank == 0:
            metrics[0] = loss.cpu()
        if self.mesh.world.rank == 0 or self.mesh.everyone.size == 1:
            metrics[1] = time.perf_counter() - self.began
        total, elapsed_s = self.mesh.everyone.allreduce(metrics).tolist()
        return total, elapsed_s


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _cut_batch(config: Config, mesh: Mesh) -> tuple[tuple[int, int], list[tuple[int, int]]]:
    """This replica's rows of the global batch, and its microbatches as pieces of those rows."""
    batch, replicas = config.train.batch, mesh.data.size
    fewest = batch // replicas
    microbatches = config.parallel.num_microbatches(fewest)
    if fewest < microbatches:
        raise LayoutError(
            f"a batch of {batch} sequences over {replicas} replicas of {microbatches} microbatches "
            f"leaves some empty; use --train.batch {replicas * microbatches} or more, or fewer "
            "--parallel.microbatches"
        )
    start, stop = partition(batch, replicas)[mesh.data.rank]
    return (start, stop), partition(stop - start, microbatches)


def _arithmetic(config: Config, mesh: Mesh) -> Callable[[], AbstractContextManager[object]]:
    if config.train.dtype != "bfloat16":
        return nullcontext
    return partial(torch.autocast, mesh.world.device.type, dtype=torch.bfloat16)
