"""Norms of single tokens; under sequence parallelism of this rank's piece of the sequences.

Statistics are float32 at least, whatever autocast does.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mpmp.models.style import Style
from mpmp.parallel.maker import Maker

RMS_EPSILON = 1e-5


class LayerNorm(nn.Module):
    """Mean and variance of each token taken out (Ba et al. 2016)."""

    def __init__(self, make: Maker, name: str, features: int) -> None:
        super().__init__()
        apart = make.sequence
        self.weight = make.parameter(f"{name}.weight", (features,), mean=1.0, apart=apart)
        self.bias = make.parameter(f"{name}.bias", (features,), apart=apart)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(_wide(x), self.weight.shape, self.weight, self.bias)


class RMSNorm(nn.Module):
    """Each token divided by its root mean square (Zhang and Sennrich 2019)."""

    def __init__(self, make: Maker, name: str, features: int) -> None:
        super().__init__()
        self.weight = make.parameter(f"{name}.weight", (features,), mean=1.0, apart=make.sequence)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(_wide(x), self.weight.shape, self.weight, RMS_EPSILON)


def make_norm(make: Maker, name: str, features: int, style: Style) -> nn.Module:
    """The norm of a style."""
    if style.norm == "none":
        return nn.Identity()
    return (LayerNorm if style.norm == "layer" else RMSNorm)(make, name, features)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
