"""Reductions: how what arrives is combined with what is there.

Associative and commutative functions of two tensors, elementwise. All are applied as
``combine(lower rank's, higher rank's)``, so that signed zeros, the payload of a NaN and a function
of the user's come out with the same bits on all ranks.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mpmp.comm.buffer import FLOATS
from mpmp.errors import ConfigError, TensorError
from mpmp.programs.tables import look_up

Op = str | Callable[..., Tensor]
"""The name of a reduction, or a function f(a, b) or f(a, b, out=), where out may be a or b."""


@dataclass(frozen=True, slots=True)
class Reduction:
    """``combine(a, b, out=a)``; ``averages`` where the sum is divided by the size at the end.

    ``own`` is a function of the user's.
    """

    name: str
    combine: Callable[..., Tensor]
    averages: bool = False
    own: bool = False

    def finish(self, x: Tensor, size: int) -> None:
        """Make the result out of what all ranks have been combined to."""
        if self.averages:
            x.div_(size)


REDUCTIONS = {
    "sum": Reduction("sum", torch.add),
    "avg": Reduction("avg", torch.add, averages=True),
    "max": Reduction("max", torch.maximum),
    "min": Reduction("min", torch.minimum),
    "prod": Reduction("prod", torch.mul),
}


NONE = Reduction("none", torch.add)
"""Of collectives that reduce nothing."""


def find(op: Op, dtype: torch.dtype) -> Reduction:
    """The reduction that is meant; errors say what to do in place of what cannot be done."""
    if callable(op):
        return _own(op)
    found = look_up(REDUCTIONS, op, "reduction")
    if dtype is torch.bool:
        raise TensorError("bool tensors cannot be reduced; convert them to an integer dtype")
    if found.averages and dtype not in FLOATS:
        raise TensorError(
            f"the average of {dtype} is no whole number; take op='sum' and divide, or convert to "
            "a float dtype first"
        )
    return found


def _own(function: Callable[..., Tensor]) -> Reduction:
    name = getattr(function, "__qualname__", None)
    if name is None:
        raise ConfigError(
            f"{function!r} has no name that ranks could compare; reduce with a function that was "
            "defined by def"
        )
    code = getattr(function, "__code__", None)  # two lambdas have one name
    line = "" if code is None else f":{code.co_firstlineno}"
    name = f"{function.__module__}.{name}{line}"
    combine = function if _takes_out(function) else _Copied(function)
    return Reduction(name, combine, own=True)


@dataclass(frozen=True, slots=True)
class _Copied:
    """A function of two tensors that makes a new one; equal where the function is the same."""

    function: Callable[..., Tensor]

    def __call__(self, a: Tensor, b: Tensor, *, out: Tensor) -> Tensor:
        return out.copy_(self.function(a, b))


def _takes_out(function: Callable[..., Any]) -> bool:
    try:
        return "out" in inspect.signature(function).parameters
    except (TypeError, ValueError):  # functions of torch have no signature, and take out
        return function.__module__.startswith("torch")
