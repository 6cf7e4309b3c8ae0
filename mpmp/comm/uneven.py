"""All-to-all with uneven counts: unless all know them, they are exchanged first, in one allgather.

    send_lengths   rank 0: 1 2    rank 0 tells rank 1 that 2 rows come. All know all counts, so
                   rank 1: 0 3    what does not fit is one error on all ranks, and nothing has to
                                  be agreed on again.

The plan is different on every rank and in every call, so it is used once.
"""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mpmp.comm import reductions
from mpmp.comm.arguments import dtype_number, result_for, rows_of
from mpmp.comm.buffer import DTYPES, admit
from mpmp.comm.spec import Spec
from mpmp.errors import ConfigError, TensorError

if TYPE_CHECKING:
    from mpmp.comm.group import Group

ALGORITHM = "pairwise"


def alltoall_uneven(
    group: Group,
    x: Tensor,
    send_lengths: list[int],
    take_lengths: list[int] | None,
    algorithm: str | None,
    out: Tensor | None,
) -> Tensor:
    """The rows that every rank has for this one; ``send_lengths`` are this rank's for each.

    ``take_lengths`` are every rank's for this one, if they are known, and are believed: another
    length is an error where it comes, but rows for a rank that says 0 meet its next call.
    """
    if algorithm not in (None, "auto", ALGORITHM):
        raise ConfigError(
            f'alltoall algorithm "{algorithm}" needs the same count for every rank; with '
            f'send_lengths take "{ALGORITHM}"'
        )
    flat, (_, row) = admit(x), rows_of(x)
    if take_lengths is None:
        take_lengths = _exchange(group, send_lengths, row, x.dtype)
    result = result_for(x, (sum(take_lengths), *x.shape[1:]), out)
    ends = [n * row for n in accumulate([*send_lengths, *take_lengths])]
    spec = Spec("alltoall", ALGORITHM, x.dtype, (0, *ends))
    plan = group._now.lower(spec)
    group._by_messages(spec, reductions.NONE, flat, 0, admit(result), flat.numel(), plan=plan)
    return result


def _exchange(group: Group, lengths: list[int], row: int, dtype: torch.dtype) -> list[int]:
    """How many rows every rank has for this one."""
    mine = torch.tensor([*lengths, row, dtype_number(dtype)], dtype=torch.int64)
    every = group.allgather(mine).view(group.size, -1)
    rows, dtypes = every[:, -2], every[:, -1]
    if bool((rows != row).any()) or bool((dtypes != mine[-1]).any()):
        said = "; ".join(
            f"rank {rank}: rows of {int(rows[place])} {DTYPES[int(dtypes[place])]}"
            for place, rank in enumerate(group.ranks)
        )
        raise TensorError(f"the ranks of group {group.name} disagree on what to do: {said}")
    return [int(length) for length in every[:, group.rank]]
