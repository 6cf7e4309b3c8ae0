"""Norms of single tokens; under sequence parallelism of this rank's piece of the sequences.

Statistics are float32 at least, whatever autocast does.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mpmp import config
from mpmp.models.style import Style
from mpmp.parallel import fused
from mpmp.parallel.maker import Maker


class LayerNorm(nn.Module):
    """Mean and variance of each token taken out (Ba et al. 2016).

    ``narrow``: nobody but products, which round it, takes the result.
    """

    def __init__(
        self, make: Maker, name: str, features: int, eps: float, narrow: bool = False
    ) -> None:
        super().__init__()
        apart, self.eps, self.narrow = make.sequence, eps, narrow
        self.weight = make.parameter(f"{name}.weight", (features,), mean=1.0, apart=apart)
        self.bias = make.parameter(f"{name}.bias", (features,), apart=apart)

    def forward(self, x: Tensor) -> Tensor:
        if self.narrow:
            return fused.layer_norm(_wide(x), self.weight, self.bias, self.eps)
        return F.layer_norm(_wide(x), self.weight.shape, self.weight, self.bias, self.eps)


class RMSNorm(nn.Module):
    """Each token divided by its root mean square (Zhang and Sennrich 2019)."""

    def __init__(self, make: Maker, name: str, features: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = make.parameter(f"{name}.weight", (features,), mean=1.0, apart=make.sequence)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(_wide(x), self.weight.shape, self.weight, self.eps)


def make_norm(
    make: Maker, name: str, model: config.Model, style: Style, narrow: bool = False
) -> nn.Module:
    """The norm of a style; ``narrow`` where products alone take the result."""
    if style.norm == "none":
        return nn.Identity()
    if style.norm == "rms":
        return RMSNorm(make, name, model.width, model.norm_eps)
    return LayerNorm(make, name, model.width, model.norm_eps, narrow)


def _wide(x: Tensor) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x if x.dtype is dtype else x.to(dtype)
