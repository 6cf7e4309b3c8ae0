"""Placement: the one description of a shard that every room reads.

Initial weights, reduction groups, the clip norm, verify, checkpoints and memory all ask a
parameter's placement and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a shard lies in the tensor that the whole model knows by ``name``.

    ``shape`` is the global shape, ``ranges`` the (start, stop) this rank holds of each dim, and
    ``replicated`` the axes of the mesh along which other ranks hold the very same elements.
    ``shared_by`` lists the pipeline stages that hold a copy (one, but for tied embeddings).
    ``primary`` is true on exactly one rank per shard within each replica of the model: the copy
    that counts in a norm and, in the first replica, the one that is written to a file.
    """

    name: str
    shape: tuple[int, ...]
    ranges: tuple[tuple[int, int], ...]
    replicated: tuple[str, ...] = ("data",)
    shared_by: tuple[int, ...] = ()
    primary: bool = True

    @property
    def local_shape(self) -> tuple[int, ...]:
        return tuple(stop - start for start, stop in self.ranges)

    @property
    def numel(self) -> int:
        return prod(self.local_shape)


def place(parameter: nn.Parameter, placement: Placement) -> nn.Parameter:
    """Attach the placement to a parameter of the shard's shape."""
    assert tuple(parameter.shape) == placement.local_shape, (placement, tuple(parameter.shape))
    parameter.placement = placement  # type: ignore[attr-defined]
    return parameter


def placement_of(parameter: Tensor) -> Placement:
    """The placement that :func:`place` attached."""
    found = getattr(parameter, "placement", None)
    assert isinstance(found, Placement), "a parameter of mpmp always has a placement"
    return found


def placed_parameters(module: nn.Module) -> Iterator[tuple[Placement, nn.Parameter]]:
    """Every parameter of a module with its placement, each once, in the module's order."""
    for parameter in module.parameters():
        yield placement_of(parameter), parameter
