"""A mode as a configuration of mpmp: the layout, the batch, and one recipe for all of them."""

from __future__ import annotations

from mpmp.config import Config, Model, Optimizer, Parallel, Train
from mpmp.job.bench.train.settings import TrainSteps


def config_of(mode: str, settings: TrainSteps, ranks: int) -> Config:
    """The configuration that trains like ``mode``; the learning rate is constant, nothing clips."""
    layouts = {
        "one": Parallel(data=1),
        "data": Parallel(data=ranks),
        "zero3": Parallel(data=ranks, zero=3),
        "tensor": Parallel(data=1, tensor=ranks),
        "pipeline": Parallel(
            data=1, pipeline=ranks, microbatches=settings.microbatches, schedule="1f1b"
        ),
    }
    parallel = layouts[mode]
    pieces = parallel.microbatches or parallel.data or 1
    return Config(
        parallel=parallel,
        comm=settings.comm,
        model=Model(
            layers=settings.layers,
            heads=settings.heads,
            width=settings.width,
            context=settings.context,
            tied=False,
        ),
        optimizer=Optimizer(
            learning_rate=settings.learning_rate, final_fraction=1.0, warmup_steps=0, clip=0.0
        ),
        train=Train(
            batch=settings.batch * pieces,
            dtype=settings.dtype,
            steps=settings.num_steps,
            eval_batches=1,
            device="cpu",
        ),
    )
