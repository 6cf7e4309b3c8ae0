"""Norms of single tokens; under sequence parallelism of this rank's piece of the sequences.

Statistics are float32 at least, whatever autocast does.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mpmp.models.style import Style
from mpmp.parallel import fused
from mpmp.parallel.maker import Maker

RMS_EPSILON = 1e-5
EPSILON = 1e-5


class LayerNorm(nn.Module):
    """Mean and variance of each token taken out (Ba et al. 2016).

    ``narrow``: nobody but products, which round it, takes the result.
    """

    def __init__(self, make: Maker, name: str, features: int, narrow: bool = False) -> None:
        super().__init__()
        apart, self.narrow = make.sequence, narrow
        self.weight = make.parameter(f"{name}.weight", (features,), mean=1.0, apart=apart)
        self.bias = make.parameter(f"{name}.bias", (features,), apart=apart)

    def forward(self, x: Tensor) -> Tensor:
        if self.narrow:
            return fused.layer_norm(_wide(x), self.weight, self.bias, EPSILON)
        return F.layer_norm(_wide(x), self.weight.shape, self.weight, self.bias, EPSILON)


class RMSNorm(nn.Module):
    """Each token divided by its root mean square (Zhang and Sennrich 2019)."""

    def __init__(self, make: Maker, name: str, features: int) -> None:
        super().__init__()
        self.weight = make.parameter(f"{name}.weight", (features,), mean=1.0, apart=make.sequence)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(_wide(x), self.weight.shape, self.weight, RMS_EPSILON)


def make_norm(
    make: Maker, name: str, features: int, style: Style, narrow: bool = False
) -> nn.Module:
    """The norm of a style; ``narrow`` where products alone take the result."""
    if style.norm == "none":
        return nn.Identity()
    if style.norm == "rms":
        return RMSNorm(make, name, features)
    return LayerNorm(make, name, features, narrow)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
