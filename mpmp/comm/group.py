"""A group of ranks and what they do together: the collectives, now, prepared or started.

Results are new tensors unless ``out`` is given. Tensors are contiguous, detached and of a dtype
that ``buffer`` lists; anything else is refused with a TensorError. All ranks of the group must
make the same calls in the same order.

Rows are elements of dim 0. ``algorithm`` names one of the table of programs in place of the choice
that the settings make; ``op`` is "sum", "avg" (the sum divided by the size), "max", "min", "prod"
or an associative and commutative function f(a, b) of yours. ``order="fixed"`` combines in the order
of the ranks whatever the size, so that the bits are those of a sum on one rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

from mpmp.comm.arguments import (
    lengths_for,
    list_of,
    own_length,
    result_for,
    root_of,
    rows_of,
    times,
)
from mpmp.comm.buffer import admit
from mpmp.comm.carrier import Carrier
from mpmp.comm.coalesced import PreparedList, by_dtype, split
from mpmp.comm.reductions import Op
from mpmp.comm.started import Replay
from mpmp.comm.uneven import alltoall_uneven
from mpmp.errors import TensorError
from mpmp.programs.partition import partition


class Group(Carrier):
    """The collectives of some ranks; Carrier says what a group knows of itself."""

    @overload
    def allreduce(
        self,
        x: Tensor,
        op: Op = "sum",
        algorithm: str | None = None,
        order: str = "any",
        out: Tensor | None = None,
    ) -> Tensor: ...

    @overload
    def allreduce(
        self,
        x: Sequence[Tensor],
        op: Op = "sum",
        algorithm: str | None = None,
        order: str = "any",
        out: Sequence[Tensor] | None = None,
    ) -> list[Tensor]: ...

    def allreduce(
        self,
        x: Tensor | Sequence[Tensor],
        op: Op = "sum",
        algorithm: str | None = None,
        order: str = "any",
        out: Tensor | Sequence[Tensor] | None = None,
    ) -> Tensor | list[Tensor]:
        """All ranks' tensors combined elementwise, on all ranks; any shape.

        A list of tensors is reduced as one vector for each dtype.
        """
        if not isinstance(x, Tensor):
            assert not isinstance(out, Tensor)
            return self._allreduce_list(x, op, algorithm, order, out)
        assert out is None or isinstance(out, Tensor)
        flat, result = admit(x), result_for(x, x.shape, out)
        asked = self._spec("allreduce", (flat.numel(),), flat, op, algorithm, None, order)
        self._carry_out(*asked, flat, 0, admit(result), 0)
        return result

    def reduce(
        self,
        x: Tensor,
        root: int = 0,
        op: Op = "sum",
        algorithm: str | None = None,
        order: str = "any",
        out: Tensor | None = None,
    ) -> Tensor | None:
        """All ranks' tensors combined elementwise, on rank ``root``; None on the others."""
        flat, is_root = admit(x), root_of(root, self, self.size) == self.rank
        result = result_for(x, x.shape, out) if is_root else flat[:0]
        asked = self._spec("reduce", (flat.numel(),), flat, op, algorithm, root, order)
        self._carry_out(*asked, flat, 0, admit(result), 0)
        return result if is_root else None

    def reduce_scatter(
        self,
        x: Tensor,
        op: Op = "sum",
        algorithm: str | None = None,
        order: str = "any",
        out: Tensor | None = None,
    ) -> Tensor:
        """This rank's rows of all ranks' tensors combined.

        ``x`` is (N, ...); rank r gets the rows ``partition(N, size)[r]``.
        """
        flat, (rows, row) = admit(x), rows_of(x)
        cuts = partition(rows, self.size)
        first, end = cuts[self.rank]
        result = result_for(x, (end - first, *x.shape[1:]), out, -first * row)
        lengths = times([stop - start for start, stop in cuts], row)
        asked = self._spec("reduce_scatter", lengths, flat, op, algorithm, None, order)
        self._carry_out(*asked, flat, 0, admit(result), first * row)
        return result

    def allgather(
        self,
        x: Tensor,
        lengths: Sequence[int] | None = None,
        algorithm: str | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """All ranks' rows, one after the other, on all ranks.

        ``x`` is (n, ...), ``lengths`` the n of every rank (omitted: all as this rank's).
        """
        flat, (rows, row) = admit(x), rows_of(x)
        lengths = self._lengths("allgather", lengths, rows)
        at = sum(lengths[: self.rank]) * row
        result = result_for(x, (sum(lengths), *x.shape[1:]), out, at)
        asked = self._spec("allgather", times(lengths, row), flat, None, algorithm, None, "any")
        self._carry_out(*asked, flat, at, admit(result), 0)
        return result

    def gather(
        self,
        x: Tensor,
        root: int = 0,
        lengths: Sequence[int] | None = None,
        algorithm: str | None = None,
        out: Tensor | None = None,
    ) -> Tensor | None:
        """All ranks' rows, one after the other, on rank ``root``; None on the others."""
        flat, (rows, row) = admit(x), rows_of(x)
        is_root = root_of(root, self, self.size) == self.rank
        lengths = self._lengths("gather", lengths, rows)
        at = sum(lengths[: self.rank]) * row
        result = result_for(x, (sum(lengths), *x.shape[1:]), out, at) if is_root else flat[:0]
        asked = self._spec("gather", times(lengths, row), flat, None, algorithm, root, "any")
        self._carry_out(*asked, flat, at, admit(result), 0)
        return result if is_root else None

    def scatter(
        self,
        x: Tensor,
        root: int = 0,
        lengths: Sequence[int] | None = None,
        algorithm: str | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """This rank's rows of the tensor of rank ``root``; the others bring one of the same shape.

        ``lengths`` are the rows of every rank (omitted: as in ``partition(N, size)``).
        """
        flat, (rows, row) = admit(x), rows_of(x)
        root_of(root, self, self.size)
        if lengths is None:
            lengths = [stop - start for start, stop in partition(rows, self.size)]
        lengths = lengths_for("scatter", lengths, self.size, rows)
        start = sum(lengths[: self.rank]) * row
        result = result_for(x, (lengths[self.rank], *x.shape[1:]), out, -start)
        asked = self._spec("scatter", times(lengths, row), flat, None, algorithm, root, "any")
        self._carry_out(*asked, flat, 0, admit(result), start)
        return result

    def broadcast(
        self, x: Tensor, root: int = 0, algorithm: str | None = None, out: Tensor | None = None
    ) -> Tensor:
        """The tensor of rank ``root`` on all ranks; the others bring one of the same shape."""
        flat, result = admit(x), result_for(x, x.shape, out)
        root_of(root, self, self.size)
        asked = self._spec("broadcast", (flat.numel(),), flat, None, algorithm, root, "any")
        self._carry_out(*asked, flat, 0, admit(result), 0)
        return result

    def alltoall(
        self,
        x: Tensor,
        send_lengths: Sequence[int] | None = None,
        algorithm: str | None = None,
        out: Tensor | None = None,
        take_lengths: Sequence[int] | None = None,
    ) -> Tensor:
        """The rows that every rank has for this one, one after the other.

        ``x`` is (N, ...): its first rows go to rank 0, the next ones to rank 1 ... Without
        ``send_lengths`` (rows for each rank, which may differ) all get the same number of rows.
        Ranks that know what each has for them say so by ``take_lengths``, all or none of them: then
        no counts are exchanged first.
        """
        flat, (rows, row) = admit(x), rows_of(x)
        if send_lengths is not None:
            lengths = lengths_for("alltoall", send_lengths, self.size, rows)
            if take_lengths is not None:
                take_lengths = lengths_for("alltoall", take_lengths, self.size, None)
            return alltoall_uneven(self, x, lengths, take_lengths, algorithm, out)
        if rows % self.size:
            raise TensorError(
                f"{rows} rows cannot be shared out evenly over {self.size} ranks; say with "
                "send_lengths how many go to each"
            )
        result = result_for(x, x.shape, out)
        each = times([rows // self.size] * self.size, row)
        asked = self._spec("alltoall", each, flat, None, algorithm, None, "any")
        self._carry_out(*asked, flat, 0, admit(result), flat.numel())
        return result

    def barrier(self, algorithm: str | None = None) -> None:
        """Return when all ranks have come here, without taking the core from those who compute."""
        note = torch.zeros(1, dtype=torch.uint8)
        asked = self._spec("barrier", (1,), note, None, algorithm, None, "any")
        self._carry_out(*asked, note, 0, note, 0)

    def numbers(self, own: Sequence[int]) -> list[list[int]]:
        """Every rank's integers, in the order of the ranks; all bring as many."""
        found: list[list[int]] = self.allgather(torch.tensor([list(own)])).tolist()
        return found

    # --- prepared ---------------------------------------------------------------------------------

    def prepare_allreduce(
        self,
        x: Tensor | Sequence[Tensor],
        op: Op = "sum",
        algorithm: str | None = None,
        order: str = "any",
    ) -> Replay:
        """An allreduce in place on memory that stays, to be run or started many times."""
        if isinstance(x, Tensor):
            return self.prepare("allreduce", x, op=op, algorithm=algorithm, order=order)
        return PreparedList(
            list_of(x, None)[0],
            lambda flat: self.prepare("allreduce", flat, op=op, algorithm=algorithm, order=order),
        )

    # --- inside -----------------------------------------------------------------------------------

    def _lengths(self, what: str, lengths: Sequence[int] | None, rows: int) -> list[int]:
        asked = [rows] * self.size if lengths is None else lengths
        return own_length(what, lengths_for(what, asked, self.size, None), self.rank, rows)

    def _allreduce_list(
        self,
        tensors: Sequence[Tensor],
        op: Op,
        algorithm: str | None,
        order: str,
        out: Sequence[Tensor] | None,
    ) -> list[Tensor]:
        tensors, out = list_of(tensors, out)
        results = [torch.empty_like(one) for one in tensors] if out is None else out
        for members, targets in zip(by_dtype(tensors), by_dtype(results), strict=True):
            flat = torch.cat(members)
            split(self.allreduce(flat, op, algorithm, order, out=flat), targets)
        return results
