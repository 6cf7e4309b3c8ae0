"""Recomputation: what backward needs is computed again in place of being kept (Chen et al. 2016).

    none        all that backward needs is kept
    selective   all but the attention scores and what they are made of (Korthikanti et al. 2022)
    full        the inputs of each block

Movements inside what is computed again are carried out again, by all ranks in the same order: the
order of backward. Masks come from counters, so that no state of a generator need be kept.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

_KEPT = object()
"""Stands for a tensor that autograd keeps."""


def recomputed(function: Callable[..., Any], *arguments: Any) -> Any:
    """``function(*arguments)``, of which only the arguments are kept for backward.

    The same as ``torch.utils.checkpoint``, which would import all of the compiler.
    """
    if not torch.is_grad_enabled():
        return function(*arguments)
    again = _Again(function, arguments)
    with saved_tensors_hooks(again.leave_out, again.bring):
        return function(*arguments)


class _Again:
    """A call whose saved tensors are numbered, and made once more when the first is wanted."""

    def __init__(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        self._function = function
        self._arguments = [_KEPT if isinstance(one, Tensor) else one for one in arguments]
        tensors = [one for one in arguments if isinstance(one, Tensor)]
        # Autograd keeps them, as it would those of any function: who watches what it keeps sees
        # them, and it finds what is changed meanwhile.
        anchor = torch.empty(0, requires_grad=True)
        self._kept: Tensor = _Kept.apply(anchor, *tensors)  # type: ignore[no-untyped-call]
        self._arithmetic = _arithmetic(arguments)
        self._count = 0
        self._found: dict[int, Tensor] = {}

    def leave_out(self, _: Tensor) -> int:
        self._count += 1
        return self._count - 1

    def bring(self, number: int) -> Tensor:
        if number not in self._found:
            self._compute()
        return self._found.pop(number)

    def _compute(self) -> None:
        # Cut off from the graph that is walked now; of this one nothing but what it saves is used.
        node: Any = self._kept.grad_fn
        tensors = iter(node.saved_tensors)
        arguments = [_cut_off(next(tensors)) if one is _KEPT else one for one in self._arguments]
        number = 0

        def keep(x: Tensor) -> int:
            nonlocal number
            # A parameter itself: its memory may be filled anew before it is read (ZeRO 3).
            self._found[number] = x if isinstance(x, nn.Parameter) else x.detach()
            number += 1
            return number

        with torch.enable_grad(), self._arithmetic(), saved_tensors_hooks(keep, self.bring):
            self._function(*arguments)
        assert number == self._count, "what is computed again must save the same tensors"


class _Kept(torch.autograd.Function):
    """Tensors that no backward of this function asks for."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return torch.empty(0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, ...]:
        raise AssertionError("what is kept has no result that a gradient could come from")


def _cut_off(argument: Tensor) -> Tensor:
    return argument.detach().requires_grad_(argument.requires_grad)


def _arithmetic(arguments: tuple[Any, ...]) -> Callable[[], AbstractContextManager[object]]:
    """The autocast in force, to be entered again."""
    device = next(one.device.type for one in arguments if isinstance(one, Tensor))
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    return lambda: torch.autocast(device, dtype=dtype, enabled=enabled)
