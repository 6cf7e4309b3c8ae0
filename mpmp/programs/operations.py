"""What layers are described by: a model's shape, a rank's share of it, and operations on that.

Shapes: B rows (sequences) of a microbatch, T time, D model, K head width. A rank holds t positions
(context), of them u between cut layers (sequence parallelism).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from mpmp.programs.partition import partition
from mpmp.programs.sequence import count, cut_sequence


@dataclass(frozen=True)
class Shape:
    """A model in plain numbers; as ``config.Model`` has them, with nothing left out."""

    kind: str
    layers: int
    heads: int
    kv_heads: int
    width: int
    hidden: int
    context: int
    vocabulary: int
    dropped: bool = False
    """Activations are dropped at random (attention weights, too)."""
    tied: bool = True
    experts: int = 0
    top_k: int = 2
    token_types: int = 2

    @property
    def head(self) -> int:
        """Features of a head."""
        return self.width // self.heads


@dataclass(frozen=True)
class Share:
    """What of a model a rank computes, and how; ranks of one layout differ in the last two."""

    tensor: int = 1
    context: int = 1
    expert: int = 1
    sequence: bool = False
    way: str = "ring"
    """How ranks that share a sequence attend: ring or ulysses."""
    recompute: str = "none"
    tensor_rank: int = 0
    context_rank: int = 0

    def of_tensor(self, length: int, unit: int = 1) -> int:
        """This rank's part of what the tensor axis cuts in multiples of ``unit``."""
        start, stop = partition(length // unit, self.tensor)[self.tensor_rank]
        return (stop - start) * unit


@dataclass(frozen=True)
class Sizes:
    """Bytes of an element: of weights and hidden states, and of what products take (autocast)."""

    stored: int = 4
    product: int = 4

    @property
    def wide(self) -> int:
        """Of sums of products."""
        return max(4, self.product)


@dataclass(frozen=True)
class Operation:
    """One step of a layer on one rank, for one microbatch."""

    name: str
    kept: float = 0.0
    """Bytes kept for backward, beyond what others keep."""
    flops: float = 0.0
    """Of matrix products, a multiply and an add each, forward."""
    parameters: int = 0
    """Elements of the weights that the rank holds."""
    again: bool = False
    """Carried out once more in backward, in place of being kept."""


def kept_bytes(operations: Iterable[Operation]) -> float:
    """Bytes that a microbatch keeps from its forward to its backward."""
    return sum(one.kept for one in operations)


def num_parameters(operations: Iterable[Operation]) -> int:
    """Elements of all weights that the rank holds."""
    return sum(one.parameters for one in operations)


def total_flops(operations: Iterable[Operation], *, hardware: bool = False) -> float:
    """Forward and backward, which costs twice as much; ``hardware``: and what is done again."""
    return sum(one.flops * (4 if hardware and one.again else 3) for one in operations)


@dataclass(frozen=True)
class Work:
    """What one rank has to do for a microbatch of ``rows`` sequences."""

    shape: Shape
    share: Share
    sizes: Sizes
    rows: int

    @cached_property
    def t(self) -> int:
        """Positions that this rank's cut layers work on."""
        share, causal = self.share, self.shape.kind != "bert"
        cut = cut_sequence(self.shape.context, share.context, share.way, causal)
        return count(cut[share.context_rank])

    @cached_property
    def tokens(self) -> int:
        """B t."""
        return self.rows * self.t

    @cached_property
    def own_tokens(self) -> int:
        """B u."""
        return self.rows * (self.share.of_tensor(self.t) if self.share.sequence else self.t)

    @cached_property
    def hidden_bytes(self) -> int:
        """Of hidden states between cut layers, (B, u, D)."""
        return self.own_tokens * self.shape.width * self.sizes.stored

    def norm(self, name: str, *, rms: bool = False) -> Operation:
        """LayerNorm keeps x, mean and deviation; RMSNorm x, its factor and their product."""
        statistic, width = self.own_tokens * self.sizes.stored, self.shape.width
        if rms:
            return Operation(name, 2 * self.hidden_bytes + statistic, parameters=width)
        return Operation(name, self.hidden_bytes + 2 * statistic, parameters=2 * width)

    def linear(
        self, name: str, inputs: int, outputs: int, kept_tokens: int, *, bias: int = 0
    ) -> Operation:
        """A product on t positions of each sequence; it keeps its input, and a weight it casts."""
        product, matrix = self.sizes.product, inputs * outputs
        cast = matrix * product if product != self.sizes.stored else 0
        kept = kept_tokens * inputs * product + cast
        return Operation(name, kept, 2.0 * self.tokens * matrix, matrix + bias)

    def dropout(self, name: str) -> tuple[Operation, ...]:
        """A mask of one byte an element of the hidden states."""
        masks = self.own_tokens * self.shape.width
        return (Operation(name, masks),) if self.shape.dropped else ()
