"""Their side: plain torch loops over the module of ``plain.py``, cut by torch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mpmp.config import Config
from mpmp.data.loader import Batches
from mpmp.job.bench import baselines
from mpmp.job.bench.train.plain import PlainGPT
from mpmp.programs.partition import partition

Step = Callable[[int], float | None]
"""Takes optimiser step ``number`` and gives the loss that this rank sees, or None."""
Weights = dict[str, Tensor]


def one(config: Config, batches: Batches, merged: Weights, rank: int, ranks: int) -> Step:
    """One process for itself: rows of the batch that no other has, where there are several."""
    model = _whole(config, batches, merged)
    return _loop(config, batches, model, model, _own_rows(config, rank, ranks))


def data(config: Config, batches: Batches, merged: Weights, rank: int, ranks: int) -> Step:
    model = _whole(config, batches, merged)
    wrapped = baselines.data_parallel(model)
    return _loop(config, batches, model, wrapped, _own_rows(config, rank, ranks))


def zero3(config: Config, batches: Batches, merged: Weights, rank: int, ranks: int) -> Step:
    model = _whole(config, batches, merged)
    baselines.fully_sharded(model, model.blocks.children())
    return _loop(config, batches, model, model, _own_rows(config, rank, ranks))


def tensor(config: Config, batches: Batches, merged: Weights, rank: int, ranks: int) -> Step:
    model = _whole(config, batches, merged)
    baselines.tensor_parallel(model)
    rows = _own_rows(config, 0, 1)
    return _loop(config, batches, model, model, rows, baselines.loss_of_cut_logits)


def pipeline(config: Config, batches: Batches, merged: Weights, rank: int, ranks: int) -> Step:
    layers = partition(config.model.layers, ranks)[rank]
    model = PlainGPT(config.model, batches.corpus.vocabulary, layers)
    model.load(merged)
    optimizer, rows = _optimizer(config, model), _own_rows(config, 0, 1)
    stage = _Autocast(model, _arithmetic(config))
    microbatches = config.parallel.microbatches
    assert microbatches is not None
    run = baselines.pipelined(stage, microbatches, _loss)

    def step(number: int) -> float | None:
        inputs, targets = batches.batch(number, *rows)
        optimizer.zero_grad()
        loss = run(inputs, targets)
        optimizer.step()
        return None if loss is None else float(loss.detach())

    return step


MAKERS = {"one": one, "data": data, "zero3": zero3, "tensor": tensor, "pipeline": pipeline}
"""How torch trains in each mode; a maker is called on every rank that takes part."""


def _whole(config: Config, batches: Batches, merged: Weights) -> PlainGPT:
    model = PlainGPT(config.model, batches.corpus.vocabulary, (0, config.model.layers))
    model.load(merged)
    return model


def _own_rows(config: Config, rank: int, ranks: int) -> tuple[int, int]:
    return partition(config.train.batch, ranks)[rank]


def _loop(
    config: Config,
    batches: Batches,
    model: nn.Module,
    forward: nn.Module,
    rows: tuple[int, int],
    cut_loss: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Step:
    """The training loop that everybody writes."""
    optimizer, arithmetic = _optimizer(config, model), _arithmetic(config)

    def step(number: int) -> float:
        inputs, targets = batches.batch(number, *rows)
        optimizer.zero_grad()
        with cut_loss():
            with arithmetic():
                loss = _loss(forward(inputs), targets)
            torch.autograd.backward(loss)
        optimizer.step()
        return float(loss.detach())

    return step


def _loss(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Mean cross entropy, in float32 as autocast has it."""
    return F.cross_entropy(logits_BTV.flatten(0, 1).float(), targets_BT.flatten())


def _optimizer(config: Config, model: nn.Module) -> torch.optim.Optimizer:
    """AdamW in one pass over memory; cut and whole tensors cannot be in one group."""
    settings = config.optimizer
    groups: dict[tuple[bool, type], list[nn.Parameter]] = {}
    for one in model.parameters():
        groups.setdefault((one.dim() >= 2, type(one.data)), []).append(one)
    return torch.optim.AdamW(
        [
            {"params": members, "weight_decay": settings.weight_decay if decays else 0.0}
            for (decays, _), members in groups.items()
        ],
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        fused=True,
    )


def _arithmetic(config: Config) -> Callable[[], AbstractContextManager[object]]:
    if config.train.dtype == "float32":
        return nullcontext
    return lambda: torch.autocast("cpu", dtype=torch.bfloat16)


class _Autocast(nn.Module):
    """A stage whose schedule calls it: the arithmetic must go along."""

    def __init__(
        self, stage: nn.Module, arithmetic: Callable[[], AbstractContextManager[object]]
    ) -> None:
        super().__init__()
        self.stage, self._arithmetic = stage, arithmetic

    def forward(self, x: Tensor) -> Tensor:
        with self._arithmetic():
            result: Tensor = self.stage(x)
        return result
