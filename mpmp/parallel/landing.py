"""What a layer that computes its weight's gradient itself has at hand while a step lasts.

    gradient   written at once where the bucket wants it, later ones added there in one pass:
               no float32 copy of a 16-bit product is made for autograd to add
    cast       a weight in the type of the products, made once and not for each microbatch

Outside of a step, and where gradients do not stay in one place, there is neither.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mpmp.parallel import fused


class Landing:
    """Of one parameter: its gradient's memory, and the weight as it was cast."""

    def __init__(self, memory: Tensor) -> None:
        self.memory = memory
        self.cast: Tensor | None = None


def begin(parameter: nn.Parameter, memory: Tensor) -> None:
    """A step begins: there is no gradient yet, and the weight stays as it is."""
    parameter.landing = Landing(memory)  # type: ignore[attr-defined]


def end(parameter: nn.Parameter) -> None:
    """The weight may change from here on."""
    parameter.landing = None  # type: ignore[attr-defined]


def add(parameter: nn.Parameter, gradient: Tensor) -> bool:
    """Add to the parameter's gradient in its place; False where it has none."""
    landing = _landing(parameter)
    if landing is None:
        return False
    gradient = gradient.view(landing.memory.shape)
    if parameter.grad is None:
        parameter.grad = landing.memory.copy_(gradient)
    else:
        fused.add_(parameter.grad, gradient)
    return True


def cast(parameter: nn.Parameter, dtype: torch.dtype) -> Tensor:
    """The weight in another type, kept until the step ends."""
    landing = _landing(parameter)
    if landing is None or dtype is parameter.dtype:
        return parameter.to(dtype)
    if landing.cast is None or landing.cast.dtype is not dtype:
        landing.cast = parameter.detach().to(dtype)
    return landing.cast


def _landing(parameter: nn.Parameter) -> Landing | None:
    found: Landing | None = getattr(parameter, "landing", None)
    return found
