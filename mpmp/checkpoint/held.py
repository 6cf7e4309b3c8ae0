"""What of a global tensor a rank holds, or wants: the address that no layout changes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mpmp.checkpoint.extents import Box, Extent, lengths, volume, whole
from mpmp.parallel.placement import Placement


@dataclass(frozen=True, eq=False)
class Held:
    """Elements [start, stop) of the row-major elements of a box of a global tensor.

    ``key`` is "kind/global name" in a checkpoint ("weight/..", "exp_avg/..") and the tensor's name
    in other files, ``shape`` that of the global tensor. ``tensor`` has the shape of the box or,
    under ZeRO, one dim of stop - start elements; its strides, device and float dtype may be any.
    """

    key: str
    shape: tuple[int, ...]
    box: Box
    tensor: Tensor
    start: int = 0
    stop: int | None = None

    def __post_init__(self) -> None:
        assert len(self.box) == len(self.shape), self
        assert all(
            0 <= low <= high <= n for (low, high), n in zip(self.box, self.shape, strict=True)
        )
        assert 0 <= self.start <= self.extent.stop <= volume(self.box), self
        assert tuple(self.tensor.shape) in (lengths(self.box), (self.extent.size,)), self

    @property
    def extent(self) -> Extent:
        """The elements, without the tensor."""
        return Extent(self.box, self.start, volume(self.box) if self.stop is None else self.stop)

    @classmethod
    def of(
        cls,
        kind: str,
        placement: Placement,
        tensor: Tensor,
        start: int = 0,
        stop: int | None = None,
    ) -> Held:
        """What a rank has of a parameter, or of one of its optimiser states."""
        key, shape = f"{kind}/{placement.name}", placement.shape
        return cls(key, shape, placement.ranges, tensor, start, stop)

    @classmethod
    def whole(cls, key: str, tensor: Tensor) -> Held:
        """All of a tensor."""
        return cls(key, tuple(tensor.shape), whole(tuple(tensor.shape)), tensor)
