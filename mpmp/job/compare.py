"""A layout compared with one process: loss, norm, gradients, and weights after some steps.

The same model is trained on all ranks in the layout and on rank 0 alone. The error of a tensor is
max|a - b| / max(max|b|, 1e-3 x the largest max|b| of its kind), a the layout's, b the one
process's; kinds are gradients and weights.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from mpmp.comm.mesh import Mesh
from mpmp.config import Config, Parallel
from mpmp.data.objective import Objective
from mpmp.errors import VerifyError
from mpmp.job.training import Training
from mpmp.parallel.merge import digest, merge
from mpmp.programs.partition import partition


@dataclass
class Comparison:
    """Worst error of each kind with the tensor that has it; hashes of what training starts from."""

    layout: str
    worst: dict[str, tuple[float, str]] = field(default_factory=dict)
    weights_sha256: str = ""
    batches_sha256: str = ""

    def note(self, kind: str, name: str, error: float, limit: float) -> None:
        """Keep the worst; raise VerifyError at the first beyond the limit (a NaN, too)."""
        if kind not in self.worst or not error <= self.worst[kind][0]:
            self.worst[kind] = (error, name)
        if not error <= limit:
            raise VerifyError(
                f"verify {self.layout}: {kind} {name} differs from one process by {error:.2e}, "
                f"more than {limit:.0e}"
            )

    def __str__(self) -> str:
        return "   ".join(f"{kind} {error:.1e}" for kind, (error, _) in self.worst.items())


def compare(
    config: Config, mesh: Mesh, objective: Objective, steps: int, limit: float
) -> Comparison:
    """Take ``steps`` in the layout of ``mesh`` and in one process, and compare.

    The result is complete on rank 0; VerifyError is raised there alone, and waiting ranks sleep
    meanwhile.
    """
    result = Comparison(mesh.layout)
    result.batches_sha256 = batches_digest(mesh, objective, config.train.batch)
    ours = Training(config, mesh, objective)
    theirs: Training | None = None
    start = merge(ours.weights(), mesh)
    if mesh.world.rank == 0:
        result.weights_sha256 = digest(start)
        train = replace(config.train, recompute="none", compile=False)
        alone = replace(config, parallel=Parallel(data=1), train=train)
        theirs = Training(alone, Mesh.single(mesh.world), objective)
        _note_all(result, "initial weight", start, _plain(theirs.weights()), limit)
    for number in range(steps):
        step = ours.step(number, number / steps)
        gradients = merge(ours.gradients(), mesh)
        if theirs is not None:
            expected = theirs.step(number, number / steps)
            result.note("loss", f"of step {number}", _relative(step.loss, expected.loss), limit)
            _note_all(result, "gradient", gradients, _plain(theirs.gradients()), limit)
            # Taken before clipping, which makes a common factor of all gradients vanish.
            result.note("norm", f"of step {number}", _relative(step.norm, expected.norm), limit)
    weights = merge(ours.weights(), mesh)
    if theirs is not None:
        _note_all(result, "weight", weights, _plain(theirs.weights()), limit)
    return result


def batches_digest(mesh: Mesh, objective: Objective, batch: int, count: int = 100) -> str:
    """SHA-256 of the first batches, put together from what each replica is asked of them."""
    cuts = partition(batch, mesh.data.size)
    lengths = [stop - start for start, stop in cuts]
    sha = hashlib.sha256()
    for number in range(count):
        rows = objective.training(number, *cuts[mesh.data.rank])
        for own in (rows.inputs_BT, rows.targets_BT):
            sha.update(mesh.data.allgather(own.contiguous(), lengths).numpy().tobytes())
    return sha.hexdigest()


def _relative(ours: float, theirs: float) -> float:
    return abs(ours - theirs) / abs(theirs)


def _plain(shards: Mapping[str, tuple[object, Tensor]]) -> dict[str, Tensor]:
    return {name: tensor.cpu() for name, (_, tensor) in shards.items()}


def _note_all(
    result: Comparison,
    kind: str,
    ours: Mapping[str, Tensor],
    theirs: Mapping[str, Tensor],
    limit: float,
) -> None:
    if set(ours) != set(theirs):
        missing = sorted(set(ours) ^ set(theirs))[0]
        result.note(kind, f"{missing} (on one side only)", float("nan"), limit)
    largest = max(float(one.abs().max()) for one in theirs.values())
    for name, expected in theirs.items():
        if ours[name].shape != expected.shape:
            result.note(kind, f"{name} (of another shape)", float("nan"), limit)
        scale = max(float(expected.abs().max()), 1e-3 * largest)
        error = float((ours[name] - expected).abs().max()) / scale
        result.note(kind, name, error, limit)
