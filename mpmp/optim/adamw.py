"""AdamW (Loshchilov and Hutter 2019) over a rank's own shards, and its learning rate."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from mpmp import config
from mpmp.parallel.placement import placement_of


def make_optimizer(
    parameters: Iterable[nn.Parameter], settings: config.Optimizer
) -> torch.optim.AdamW:
    """Matrices decay; biases (those of queries, keys and values are stacked) and norms do not."""
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for one in parameters:
        is_bias = placement_of(one).name.endswith(".bias")
        (vectors if one.dim() < 2 or is_bias else matrices).append(one)
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        foreach=True,
    )


def learning_rate(settings: config.Optimizer, step: int, progress: float) -> float:
    """Half a cosine down to the final fraction over ``progress`` in [0, 1], times the warm-up.

    The warm-up climbs linearly over the first steps, ``step`` counted from 0.
    """
    warmup = min(1.0, (step + 1) / max(1, settings.warmup_steps))
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    final = settings.final_fraction
    return settings.learning_rate * warmup * (final + (1 - final) * cosine)
