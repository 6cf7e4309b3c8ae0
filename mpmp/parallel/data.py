"""Data parallelism: gradients live in buckets that are summed over replicas during backward.

    parameters, last used first     p9 p8 p7 | p6 p5 | p4 ... p0     one flat buffer a bucket,
    backward fills them             =========>                      every .grad a view of it
    a full bucket starts its sum        [sum 0]  [sum 1]  [sum 2]    while backward goes on

All ranks start the buckets in the order of their numbers, whatever order gradients arrive in and
whichever parameters a batch leaves unused; two orders would add up different buckets.

A gradient is reduced over exactly the axes on which its parameter is replicated while its data
differ: the data axis, and for a weight that both ends of a pipeline use the stages of both.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from torch import Tensor, nn

from mpmp.comm.group import Group
from mpmp.comm.mesh import Mesh
from mpmp.comm.progress import Handle
from mpmp.parallel.placement import Placement, placement_of


class Bucket:
    """Gradients that lie side by side in one flat buffer and are summed as one."""

    def __init__(self, parameters: list[nn.Parameter], group: Group) -> None:
        self.parameters, self.group = parameters, group
        first = parameters[0]
        length = sum(one.numel() for one in parameters)
        # Where ranks share memory the gradients live there, and are summed where they lie.
        self.flat = group.empty((length,), first.dtype, first.device).zero_()
        self.missing = 0
        offset = 0
        for one in parameters:
            one.grad = self.flat[offset : offset + one.numel()].view(one.shape)
            offset += one.numel()
        self._sum = group.prepare_allreduce(self.flat) if group.size > 1 else None
        self._handle: Handle | None = None

    def expect(self) -> None:
        """A new step: all gradients are zero and none has been computed."""
        self.flat.zero_()
        self.missing = len(self.parameters)

    def start(self) -> None:
        if self._sum is not None:
            self._handle = self._sum.start()

    def wait(self) -> float:
        """Return when the sum is there; the seconds this rank waited for it."""
        if self._handle is None:
            return 0.0
        waited = self._handle.wait()
        self._handle = None
        return waited


class GradientBuckets:
    """The buckets of a stage.

    ``expect`` opens a step, ``last_microbatch`` announces the backward that completes the
    gradients (only then may sums start), ``finish`` starts what is left and waits for all.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], mesh: Mesh, bucket_bytes: float) -> None:
        self.buckets = _fill(list(parameters), mesh, bucket_bytes)
        self.exposed_s = 0.0
        """Seconds the ranks have waited for sums that backward did not hide."""
        self._armed = False
        self._next = 0
        for bucket in self.buckets:
            for one in bucket.parameters:
                one.register_post_accumulate_grad_hook(partial(self._ready, bucket))  # type: ignore[no-untyped-call]

    def expect(self) -> None:
        self._armed, self._next = False, 0
        for bucket in self.buckets:
            bucket.expect()

    def last_microbatch(self) -> None:
        self._armed = True

    def finish(self) -> None:
        for bucket in self.buckets[self._next :]:
            bucket.start()
        self._next = len(self.buckets)
        for bucket in self.buckets:
            self.exposed_s += bucket.wait()

    def _ready(self, bucket: Bucket, parameter: Tensor) -> None:
        """A gradient was added to a bucket; start every bucket whose turn it is."""
        if not self._armed:
            return
        bucket.missing -= 1
        while self._next < len(self.buckets) and self.buckets[self._next].missing == 0:
            self.buckets[self._next].start()
            self._next += 1


def _group_of(placement: Placement, mesh: Mesh) -> Group:
    """The ranks that hold the same elements but see other data."""
    if placement.shared_by:
        assert mesh.ends is not None, "a weight is shared by the ends of a pipeline"
        return mesh.ends
    assert "data" in placement.replicated
    return mesh.data


def _fill(parameters: list[nn.Parameter], mesh: Mesh, bucket_bytes: float) -> list[Bucket]:
    """Cut the parameters, last used first, into buckets; those shared by both ends come last."""
    shared = [one for one in parameters if placement_of(one).shared_by]
    buckets: list[Bucket] = []
    filling: list[nn.Parameter] = []
    for one in reversed(parameters):
        if placement_of(one).shared_by:
            continue
        size = sum(other.numel() * other.itemsize for other in filling)
        if filling and size + one.numel() * one.itemsize > bucket_bytes:
            buckets.append(Bucket(filling, _group_of(placement_of(one), mesh)))
            filling = []
        filling.append(one)
    for rest in (filling, shared):
        if rest:
            buckets.append(Bucket(rest, _group_of(placement_of(rest[0]), mesh)))
    return buckets
