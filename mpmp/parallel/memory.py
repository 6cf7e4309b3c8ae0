"""What a rank's memory holds, counted, beside what formulas say.

    activations   what autograd keeps from a forward for its backward      layers.py
    states        weights, gradients and moments                           states.py
    all           every memory that any operation has met and that lives still

Every memory is counted once, whatever number of views of it are kept, and whole, for a view keeps
all of it alive. What the caller holds anyway (weights, tokens, the hidden states that came in) is
not counted, and what a part of the graph kept that is gone neither.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar
from weakref import WeakSet, ref

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mpmp.parallel.states import States, formula, held
from mpmp.parallel.zero import Sharded

Result = TypeVar("Result")


@dataclass(frozen=True)
class Kept:
    """One memory that autograd keeps: its bytes, and a tensor that lies in it."""

    nbytes: int
    shape: tuple[int, ...]
    dtype: torch.dtype


def measure(
    forward: Callable[[], Result], besides: Iterable[Tensor] = ()
) -> tuple[Result, list[Kept]]:
    """What ``forward()`` gives, and every memory that autograd keeps for its backward.

    In the order in which they were kept first. ``besides`` are tensors whose memory is not counted.
    Carry the backward out: torch's hooks tie functions to what they keep of their own results, so
    that a graph without one is never given back.
    """
    alive: WeakSet[_Held] = WeakSet()
    number = 0

    def keep(x: Tensor) -> _Held:
        nonlocal number
        number += 1
        one = _Held(x, number)
        alive.add(one)
        return one

    with saved_tensors_hooks(keep, _Held.tensor):
        result = forward()
    seen = {one.untyped_storage().data_ptr() for one in besides}
    found: list[Kept] = []
    for one in sorted(alive, key=lambda one: one.number):
        storage = one.x.untyped_storage()
        if storage.data_ptr() not in seen and storage.nbytes():
            found.append(Kept(storage.nbytes(), tuple(one.x.shape), one.x.dtype))
            seen.add(storage.data_ptr())
    return result, found


def kept_bytes(kept: Iterable[Kept]) -> int:
    """Bytes of all of them."""
    return sum(one.nbytes for one in kept)


class _Held:
    """A tensor as long as autograd has it."""

    __slots__ = ("__weakref__", "number", "x")

    def __init__(self, x: Tensor, number: int) -> None:
        self.x, self.number = x, number

    def tensor(self) -> Tensor:
        return self.x


class Living(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of every memory that operations inside have met, as long as it lives.

    ``bytes`` is what lives now, ``most_bytes`` the most that did at once. Tensors without memory
    (torch's fake ones) count as what they would take.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = self.most_bytes = 0
        self._known: dict[int, ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for one in tree_leaves((args, kwargs, result)):
            if isinstance(one, Tensor):
                self._meet(one.untyped_storage())
        return result

    def _meet(self, storage: torch.UntypedStorage) -> None:
        key, nbytes = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def gone(_: object) -> None:
            self.bytes -= nbytes
            del self._known[key]

        self._known[key] = ref(storage, gone)
        self.bytes += nbytes
        self.most_bytes = max(self.most_bytes, self.bytes)


@dataclass(frozen=True)
class Row:
    """One line of a table: bytes counted on this rank, and bytes that the formula says."""

    what: str
    counted: float
    expected: float

    @property
    def error(self) -> float:
        """Relative to the formula."""
        return self.counted / self.expected - 1 if self.expected else float(self.counted > 0)


def expected_states(sharded: Sharded, stage: int) -> States:
    """What ZeRO's formula gives for the parameters of a rank, each shared out over its replicas."""
    flats = [bucket.flat for bucket in sharded.buckets]
    sizes = [flat.dtype.itemsize for flat in flats]
    parts = [
        formula(flat.length, flat.group.size, stage, (size, size, 2 * size))
        for flat, size in zip(flats, sizes, strict=True)
    ]
    return States(
        sum(one.weights for one in parts),
        sum(one.gradients for one in parts),
        sum(one.optimizer for one in parts),
    )


def table(
    sharded: Sharded,
    optimizer: torch.optim.Optimizer,
    stage: int,
    kept: Sequence[Kept],
    expected_bytes: float,
    alive: int = 1,
) -> list[Row]:
    """A rank's memory behind a step, part by part.

    ``kept`` was measured in the forward of one microbatch, ``expected_bytes`` says the formula of
    it, and of ``alive`` microbatches as much is there at once. ``stage`` is that of ZeRO.
    """
    states, formulas = held(sharded, optimizer), expected_states(sharded, stage)
    return [
        Row("weights", states.weights, formulas.weights),
        Row("gradients", states.gradients, formulas.gradients),
        Row("optimizer states", states.optimizer, formulas.optimizer),
        Row("activations", alive * kept_bytes(kept), alive * expected_bytes),
    ]


def show(rows: Iterable[Row]) -> str:
    """The table as text, in MB."""
    lines = [f"{'':16} {'counted MB':>12} {'formula MB':>12} {'error':>8}"]
    lines += [
        f"{row.what:16} {row.counted / 1e6:12.3f} {row.expected / 1e6:12.3f} {row.error:8.2%}"
        for row in rows
    ]
    return "\n".join(lines)
