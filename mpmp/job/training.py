"""One training step, and what it needs, built from a configuration on a mesh.

    rows of the global batch -> microbatches -> pipeline (forward, backward, buckets summed)
        -> global norm, clip -> optimiser on own pieces -> one small sum of metrics

train and verify take the same step; nothing here knows which of them it serves.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor

from mpmp.comm.mesh import Mesh
from mpmp.config import Config
from mpmp.data.loader import Batches
from mpmp.data.objective import Objective, Sequences
from mpmp.errors import CheckpointError, LayoutError, NotFiniteError
from mpmp.job.assembly import arithmetic, assemble
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


class Training:
    """The shard of the model, optimiser and data that one rank has, and the step they take."""

    def __init__(self, config: Config, mesh: Mesh, batches: Batches) -> None:
        self.config, self.mesh, self.batches = config, mesh, batches
        self.objective = Objective(
            batches, masked=config.model.kind == "bert", shortest=config.data.shortest
        )
        self.rows, self.cuts = _cut_batch(config, mesh)
        self.positions = self._own_positions()
        made = assemble(config, mesh, self.objective.vocabulary, self._example)
        self.schedule, self.stages, self.cut = made.schedule, made.stages, made.cut
        bucket_mb = config.parallel.bucket_mb
        bucket_bytes = None if bucket_mb is None else bucket_mb * 1e6
        self.sharded = zero.make(self.stages, mesh, config.parallel.zero, bucket_bytes)
        self.pieces = self.sharded.pieces()
        self.optimizer = make_optimizer(self.pieces, config.optimizer)
        self.scale = LossScale(enabled=config.train.dtype == "float16")
        self.pipeline = Pipeline(mesh, self.stages, self.schedule, arithmetic(config, mesh))
        self.began = time.perf_counter()

    def step(self, number: int, progress: float) -> Step:
        """Take optimiser step ``number``; ``progress`` in [0, 1] sets the learning rate.

        Raises NotFiniteError on every rank alike where loss or norm is not finite; no weight has
        changed then.
        """
        scale = self.scale.value
        loss = self.backward(number, self.objective.counted(number))
        norm = float(global_norm(self.pieces, self.mesh.everyone))
        total, elapsed_s = self._agree(loss)
        rate = learning_rate(self.config.optimizer, number, progress)
        if scale > 1.0 and isfinite(total) and not isfinite(norm):
            self.scale.update(False)
            return Step(total, norm, rate, elapsed_s, skipped=True)
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
        return Step(total, norm / scale, rate, elapsed_s)

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
        mesh, batches = self.mesh, self.batches.validation_batches
        total = torch.zeros((), dtype=torch.float64, device=mesh.world.device)
        with self.sharded.whole():
            # Replicas take batches in turn, and all as many: they may share experts.
            for first in range(0, batches, mesh.data.size):
                index = min(first + mesh.replica, batches - 1)
                score = self.pipeline.score([self._own(self.objective.validation(index), False)])
                if first + mesh.replica < batches and mesh.tensor.rank == 0:
                    total += score
        return float(mesh.everyone.allreduce(total)) / self.objective.scored()

    @torch.no_grad()
    def next_logits(self, tokens: list[int], at: int) -> Tensor | None:
        """Logits (V) behind the token at ``at`` of one sequence as long as the context.

        All ranks call it; it is there on the ranks that have that place and the last stage.
        """
        inputs = torch.tensor([tokens])
        rows = Sequences(inputs, inputs, torch.zeros(1, dtype=torch.int64))
        microbatch = self._own(rows, False)
        hidden = self.pipeline.hidden(microbatch)
        if hidden is None:
            return None
        assert self.pipeline.last is not None
        logits = self.pipeline.last.logits(hidden, microbatch)
        place = (self.positions == at).nonzero()
        return logits[0, int(place)] if len(place) else None

    # --- what it holds ----------------------------------------------------------------------------

    def weights(self) -> Shards:
        """This rank's shard of each weight; all ranks together."""
        return self.sharded.weights()

    def gradients(self) -> Shards:
        """This rank's shard of each gradient, summed over replicas (and clipped) after a step."""
        return self.sharded.gradients()

    def state(self) -> dict[str, Tensor]:
        """Everything a checkpoint must hold of this rank: weights and optimiser state."""
        state: dict[str, Tensor] = {}
        for piece in self.pieces:
            name = _key(piece)
            state[f"weight/{name}"] = piece.parameter.detach()
            for key, value in self.optimizer.state.get(piece.parameter, {}).items():
                state[f"{key}/{name}"] = value
        for key, number in self.scale.state().items():
            state[f"scale/{key}"] = torch.tensor(number, dtype=torch.float64)
        return state

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take back what :meth:`state` gave, bit for bit; CheckpointError where it does not fit."""
        with torch.no_grad():
            for piece in self.pieces:
                name, one = _key(piece), piece.parameter
                saved = state.get(f"weight/{name}")
                if saved is None or saved.shape != one.shape or saved.dtype != one.dtype:
                    there = "no such tensor" if saved is None else _kind(saved)
                    raise CheckpointError(
                        f"the checkpoint is of another model: {name} is {_kind(one)} in this "
                        f"run and {there} there; use its vocabulary, model, dtype and settings of "
                        "parallel"
                    )
                one.copy_(saved)
                moments = {
                    key: state[f"{key}/{name}"].to(one.device)
                    for key in ("step", "exp_avg", "exp_avg_sq")
                    if f"{key}/{name}" in state
                }
                if moments:  # there are none as long as every step has overflowed
                    self.optimizer.state[one] = moments
        prefix = "scale/"
        scale = {
            key.removeprefix(prefix): float(x) for key, x in state.items() if key.startswith(prefix)
        }
        self.scale.load(scale)
        self.sharded.step_done()

    # --- its share of the data --------------------------------------------------------------------

    def _own_positions(self) -> Tensor:
        config, context = self.config, self.mesh.context
        causal = config.model.kind != "bert"
        cuts = cut_sequence(config.model.context, context.size, config.parallel.attention, causal)
        return torch.tensor(positions(cuts[context.rank]), dtype=torch.int64)

    def _microbatches(self, number: int) -> list[Microbatch]:
        rows = self.objective.training(number, *self.rows)
        return [self._own(rows.rows(low, high), True) for low, high in self.cuts]

    def _example(self) -> Microbatch:
        """A microbatch to measure layers with."""
        return self._own(self.objective.training(0, *self.rows).rows(*self.cuts[0]), True)

    def _own(self, rows: Sequences, drops: bool) -> Microbatch:
        """What this rank's place on the context axis holds of some sequences."""
        device, own = self.mesh.world.device, self.positions
        return Microbatch(
            inputs_Bt=rows.inputs_BT[:, own].to(device),
            targets_Bt=rows.targets_BT[:, own].to(device),
            samples_B=rows.samples_B.to(device) if drops else None,
            positions_t=own.to(device),
            length=rows.inputs_BT.shape[1],
            lengths_B=None if rows.lengths_B is None else rows.lengths_B.to(device),
        )

    def _agree(self, loss: Tensor) -> tuple[float, float]:
        """The loss over all replicas, and rank 0's clock, on every rank."""
        metrics = torch.zeros(2, dtype=torch.float64)
        if self.mesh.tensor.rank == 0:
            metrics[0] = loss.cpu()
        if self.mesh.world.rank == 0 or self.mesh.everyone.size == 1:
            metrics[1] = time.perf_counter() - self.began
        total, elapsed_s = self.mesh.everyone.allreduce(metrics).tolist()
        return total, elapsed_s


def _key(piece: zero.Piece) -> str:
    """The name of a piece in a checkpoint."""
    name = piece.placement.name
    whole = piece.stop - piece.start == piece.placement.numel
    return name if whole else f"{name}[{piece.start}:{piece.stop}]"


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
    start, stop = partition(batch, replicas)[mesh.replica]
    return (start, stop), partition(stop - start, microbatches)
