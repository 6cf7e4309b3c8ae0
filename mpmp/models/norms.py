"""Norms of single tokens; under sequence parallelism of this rank's piece of the sequences.

Statistics are float32 at least, whatever autocast does.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mpmp import config
from mpmp.models.style import Style
from mpmp.parallel.maker import Maker


class LayerNorm(nn.Module):
    """Mean and variance of each token taken out (Ba et al. 2016)."""

    def __init__(self, make: Maker, name: str, features: int, eps: float) -> None:
        super().__init__()
        apart, self.eps = make.sequence, eps
        self.weight = make.parameter(f"{name}.weight", (features,), mean=1.0, apart=apart)
        self.bias = make.parameter(f"{name}.bias", (features,), apart=apart)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(_wide(x), self.weight.shape, self.weight, self.bias, self.eps)


class RMSNorm(nn.Module):
    """Each token divided by its root mean square (Zhang and Sennrich 2019)."""

    def __init__(self, make: Maker, name: str, features: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = make.parameter(f"{name}.weight", (features,), mean=1.0, apart=make.sequence)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(_wide(x), self.weight.shape, self.weight, self.eps)


def make_norm(make: Maker, name: str, model: config.Model, style: Style) -> nn.Module:
    """The norm of a style."""
    if style.norm == "none":
        return nn.Identity()
    kind = LayerNorm if style.norm == "layer" else RMSNorm
    return kind(make, name, model.width, model.norm_eps)


def _wide(x: Tensor) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x if x.dtype is dtype else x.to(dtype)
