"""One training step, and what it needs, built from a configuration on a mesh.

    rows of the global batch -> microbatches -> pipeline (forward, backward, buckets summed)
        -> global norm, clip -> optimiser on own pieces -> one small sum of metrics

train and verify take the same step; nothing here knows which of them it serves.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor

from mpmp.comm.mesh import Mesh
from mpmp.config import Config
from mpmp.data.objective import Objective, Sequences
from mpmp.errors import LayoutError, NotFiniteError
from mpmp.job.assembly import arithmetic, assemble
from mpmp.job.beginning import begin, vocabulary_of
from mpmp.optim.adamw import learning_rate, make_optimizer
from mpmp.optim.clip import clip_, global_norm
from mpmp.optim.scale import LossScale
from mpmp.parallel import zero
from mpmp.parallel.pipeline import Pipeline
from mpmp.parallel.placement import Placement
from mpmp.parallel.stage import Microbatch
from mpmp.programs.partition import partition
from mpmp.programs.sequence import cut_sequence, positions

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
    skipped: bool = False
    """Whether 16-bit gradients overflowed: no weight has changed, the loss scale was halved."""
    agreed: bool = False
    """Whether all ranks said yes to what :attr:`Training.asked` asks."""


class Training:
    """The shard of the model, optimiser and data that one rank has, and the step they take."""

    def __init__(self, config: Config, mesh: Mesh, objective: Objective) -> None:
        self.config, self.mesh, self.objective = config, mesh, objective
        self.rows, self.cuts = _cut_batch(config, mesh)
        vocabulary = vocabulary_of(config.model, objective.vocabulary)
        made = assemble(config, mesh, vocabulary, self._example, objective.tags)
        self.schedule, self.stages, self.cut = made.schedule, made.stages, made.cut
        bucket_mb = config.parallel.bucket_mb
        bucket_bytes = None if bucket_mb is None else bucket_mb * 1e6
        self.sharded = zero.make(self.stages, mesh, config.parallel.zero, bucket_bytes)
        self.pieces = self.sharded.pieces()
        self.notes = begin(config, self.pieces, mesh)
        """Sentences on what the weights began from."""
        if self.notes:
            self.sharded.step_done()
        self.optimizer = make_optimizer(self.pieces, config.optimizer)
        self.scale = LossScale(enabled=config.train.dtype == "float16")
        self.pipeline = Pipeline(mesh, self.stages, self.schedule, arithmetic(config, mesh))
        self.began = time.perf_counter()
        self.asked: Callable[[], bool] = lambda: False
        """Asked of every rank in each step: an agreement that costs no message of its own."""

    def step(self, number: int, progress: float) -> Step:
        """Take optimiser step ``number``; ``progress`` in [0, 1] sets the learning rate.

        Raises NotFiniteError on every rank alike where loss or norm is not finite; no weight has
        changed then.
        """
        scale = self.scale.value
        loss = self.backward(number, self.objective.counted(number))
        norm = float(global_norm(self.pieces, self.mesh.everyone))
        total, elapsed_s, agreed = self._agree(loss)
        rate = learning_rate(self.config.optimizer, number, progress)
        if scale > 1.0 and isfinite(total) and not isfinite(norm):
            self.scale.update(False)
            return Step(total, norm, rate, elapsed_s, skipped=True, agreed=agreed)
        if not (isfinite(total) and isfinite(norm)):
            raise NotFiniteError(
                f"step {number}: the loss is {total} and the gradient norm {norm / scale}; "
                "lower --optimizer.learning-rate or use --train.dtype float32"
            )
        self.scale.update(True)
        clip_(self.pieces, norm, self.config.optimizer.clip, scale)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.sharded.step_done()
        return Step(total, norm / scale, rate, elapsed_s, agreed=agreed)

    def backward(self, number: int, counted: int) -> Tensor:
        """Forward and backward of a step of so many counted tokens; this rank's loss."""
        return self.pipeline.train(
            self._microbatches(number),
            counted,
            self.config.train.batch,
            self.sharded,
            self.scale.value,
        )

    def validate(self) -> float:
        """Mean loss over the validation, nats per token, the same on every rank."""
        mesh, batches = self.mesh, self.objective.validation_batches
        total = torch.zeros((), dtype=torch.float64, device=mesh.world.device)
        with self.sharded.whole():
            # Replicas take batches in turn, and all as many: they may share experts.
            for first in range(0, batches, mesh.data.size):
                index = min(first + mesh.replica, batches - 1)
                score = self.pipeline.score([self.own(self.objective.validation(index), False)])
                if first + mesh.replica < batches and mesh.tensor.rank == 0:
                    total += score
        return float(mesh.everyone.allreduce(total)) / self.objective.scored()

    # --- what it holds ----------------------------------------------------------------------------

    def weights(self) -> Shards:
        """This rank's shard of each weight; all ranks together."""
        return self.sharded.weights()

    def gradients(self) -> Shards:
        """This rank's shard of each gradient, summed over replicas (and clipped) after a step."""
        return self.sharded.gradients()

    # --- its share of the data --------------------------------------------------------------------

    def _own_positions(self, length: int) -> Tensor:
        """Places of a sequence of ``length`` tokens that this rank holds."""
        config, context = self.config, self.mesh.context
        causal = config.model.kind != "bert"
        cuts = cut_sequence(length, context.size, config.parallel.attention, causal)
        return torch.tensor(positions(cuts[context.rank]), dtype=torch.int64)

    def _microbatches(self, number: int) -> list[Microbatch]:
        rows = self.objective.training(number, *self.rows)
        return [self.own(rows.rows(low, high), True) for low, high in self.cuts]

    def _example(self) -> Microbatch:
        """A microbatch to measure layers with."""
        return self.own(self.objective.training(0, *self.rows).rows(*self.cuts[0]), True)

    def own(self, rows: Sequences, drops: bool) -> Microbatch:
        """What this rank's place on the context axis holds of some sequences."""
        device, length = self.mesh.world.device, rows.inputs_BT.shape[1]
        own = self._own_positions(length)
        return Microbatch(
            inputs_Bt=rows.inputs_BT[:, own].to(device),
            targets_Bt=rows.targets_BT[:, own].to(device),
            samples_B=rows.samples_B.to(device) if drops else None,
            positions_t=own.to(device),
            length=length,
            lengths_B=None if rows.lengths_B is None else rows.lengths_B.to(device),
        )

    def _agree(self, loss: Tensor) -> tuple[float, float, bool]:
        """The loss over all replicas, rank 0's clock, and whether all said yes; on every rank."""
        everyone = self.mesh.everyone
        metrics = torch.zeros(3, dtype=torch.float64)
        if self.mesh.tensor.rank == 0:
            metrics[0] = loss.cpu()
        if everyone.rank == 0:
            metrics[1] = time.perf_counter() - self.began
        metrics[2] = self.asked()
        total, elapsed_s, yes = everyone.allreduce(metrics).tolist()
        return total, elapsed_s, yes == everyone.size


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
    start, stop = partition(batch, replicas)[mesh.replica]
    return (start, stop), partition(stop - start, microbatches)
