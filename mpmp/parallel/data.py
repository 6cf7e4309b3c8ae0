"""Data parallelism: gradients are gathered in buckets and summed over ranks during backward.

    parameters, last used first     p9 p8 p7 | p6 p5 | p4 ... p0     a bucket is a flat range,
    backward fills them             =========>                      in memory that ranks share
    a full bucket starts its sum        [sum 0]  [sum 1]  [sum 2]    while backward goes on

All ranks of a group start its buckets in one order, whatever order gradients arrive in and
whichever parameters a batch leaves unused; two orders would add up different buckets. The order is
that in which the schedule completes the chunks, and within a chunk that of the buckets.

A gradient is reduced over exactly the axes on which its parameter is replicated while its data
differ (``Placement.summed``), and for a weight that both ends of a pipeline use over both.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from torch import Tensor, nn

from mpmp.comm.mesh import Mesh
from mpmp.comm.progress import Handle
from mpmp.parallel import landing
from mpmp.parallel.flat import Flat, fill, users
from mpmp.parallel.placement import placement_of


class Gradients(Protocol):
    """What a pipeline tells of the gradients it computes."""

    def begin(self) -> None:
        """A new step: all gradients are zero."""
        ...

    def writing(
        self,
        chunk: int,
        *,
        last: bool = False,
        complete: bool = True,
        deferred: Collection[nn.Parameter] | None = None,
    ) -> AbstractContextManager[None]:
        """The action inside writes gradients of a chunk.

        ``last``: no later action of the step does. ``complete`` is false where weight gradients
        are left for later; the action that computes them lists their parameters as ``deferred``.
        """
        ...

    def add(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        """A gradient that was left for later."""
        ...

    def finish(self) -> None:
        """Return when all sums are there."""
        ...


class Bucket:
    """Gradients in memory that stays, reduced when all backwards of a step have added theirs.

    ``collective`` is allreduce, or reduce_scatter where each rank needs its piece alone.
    """

    every_time = False
    """Whether each microbatch is reduced, and not merely the last."""
    told = False
    """Whether somebody says when backward has written all, which is then not to be counted."""

    def __init__(
        self, flat: Flat, collective: str = "allreduce", memory: Tensor | None = None
    ) -> None:
        self.flat = flat
        self.memory = flat.empty().zero_() if memory is None else memory
        self.views = dict(zip(flat.parameters, flat.views(self.memory), strict=True))
        self.missing = 0
        """Gradients that the action under way has yet to write."""
        self.open: set[int] = set()
        """Chunks that go on writing in this step."""
        self.started = False
        self.waited_s = 0.0
        self._passes = 2 if collective == "allreduce" else 1
        alone = flat.group.size == 1
        self._reduce = None if alone else flat.group.prepare(collective, self.memory)
        self._handle: Handle | None = None

    @property
    def own(self) -> Tensor:
        """This rank's piece of the sum."""
        return self.memory[slice(*self.flat.own)]

    def begin(self) -> None:
        self.open, self.started = set(self.flat.chunks), False
        for one, view in self.views.items():
            one.grad = None
            if not self.every_time:
                landing.begin(one, view)

    def expect(self) -> None:
        """Backward is about to write the gradients, where somebody says so."""

    def written(self, parameter: nn.Parameter) -> None:
        """Keep the gradient that autograd has computed: the first one is copied, not added."""
        assert not self.started, "a gradient came after the sum had started"
        view = self.views[parameter]
        if parameter.grad is not view:
            assert parameter.grad is not None
            view.copy_(parameter.grad)
            parameter.grad = view

    def start(self) -> None:
        for one, view in self.views.items():
            if one.grad is None:
                one.grad = view.zero_()
        self.started = True
        if self._reduce is not None:
            self.flat.passes += self._passes
            self._handle = self._reduce.start()

    def wait(self) -> None:
        if self._handle is not None:
            self.waited_s += self._handle.wait()
            self._handle = None


class GradientBuckets:
    """Starts the sums of buckets as they fill up; see :class:`Gradients`.

    Buckets ``at_finish`` belong to groups whose ranks carry out different schedules: they start
    when all actions are done.
    """

    def __init__(self, buckets: Sequence[Bucket], at_finish: Collection[Bucket] = ()) -> None:
        self.buckets, self._at_finish = list(buckets), at_finish
        self._due: deque[Bucket] = deque()
        self._of: dict[nn.Parameter, Bucket] = {}
        for bucket in self.buckets:
            for one in bucket.flat.parameters:
                self._of[one] = bucket
                one.register_post_accumulate_grad_hook(self._computed)  # type: ignore[no-untyped-call]

    @property
    def exposed_s(self) -> float:
        """Seconds this rank has waited for sums that backward did not hide."""
        return sum(bucket.waited_s for bucket in self.buckets)

    def begin(self) -> None:
        for bucket in self.buckets:
            bucket.begin()

    @contextmanager
    def writing(
        self,
        chunk: int,
        *,
        last: bool = False,
        complete: bool = True,
        deferred: Collection[nn.Parameter] | None = None,
    ) -> Iterator[None]:
        assert complete or not last
        for bucket in self.buckets:
            if chunk not in bucket.flat.chunks:
                continue
            if last:
                bucket.open.discard(chunk)
            closes = bucket.every_time or not (bucket.open or bucket in self._at_finish)
            if complete and closes:
                self._due.append(bucket)
                writes = bucket.flat.parameters if deferred is None else deferred
                bucket.missing = sum(self._of[one] is bucket for one in writes)
                bucket.missing += bucket.told and deferred is None
        self._start_ready()
        yield
        # What is missing now is used by no sample of this rank's.
        while self._due:
            self._due.popleft().start()

    def add(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        if parameter.grad is None:
            parameter.grad = gradient.view(parameter.shape)
        else:
            parameter.grad += gradient.view(parameter.shape)
        self._computed(parameter)

    def finish(self) -> None:
        for bucket in self.buckets:
            if not bucket.started:
                bucket.start()
        for bucket in self.buckets:
            bucket.wait()
            for one in bucket.flat.parameters:
                landing.end(one)

    def all_written(self, buckets: Iterable[Bucket]) -> None:
        """Backward has written all gradients of some buckets that it will."""
        for bucket in buckets:
            bucket.missing = 0
        self._start_ready()

    def _computed(self, parameter: nn.Parameter) -> None:
        """A gradient is there; start every bucket whose turn it is."""
        bucket = self._of[parameter]
        if parameter.grad is not None:  # autograd also reports those that are left for later
            bucket.written(parameter)
        bucket.missing -= 1
        self._start_ready()

    def _start_ready(self) -> None:
        while self._due and self._due[0].missing == 0:
            self._due.popleft().start()


def replicated_buckets(
    chunks: Sequence[nn.Module], mesh: Mesh, bucket_bytes: float | None = None
) -> list[Bucket]:
    """Buckets for all parameters of a rank's chunks, whose sums every rank keeps whole."""
    used = users(chunks)
    groups = {one: mesh.sum_group(placement_of(one)) for one in used}
    return [Bucket(flat) for flat in fill(used, used, groups, bucket_bytes)]
