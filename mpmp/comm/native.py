"""The MPI library's own collectives on host tensors: what bench compares ours with."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from mpmp.comm.group import Group
from mpmp.comm.mpi import MPI
from mpmp.programs.partition import partition

OPERATIONS = {"sum": MPI.SUM, "max": MPI.MAX, "min": MPI.MIN, "prod": MPI.PROD}
DTYPES = (torch.float32, torch.float64, torch.int32)
FORCING = ("OMPI_MCA_coll", "MPIR_CVAR_")
"""How the names of settings begin that force an algorithm on a library."""


def native_call(
    group: Group, collective: str, x: Tensor, out: Tensor, *, op: str = "sum", root: int = 0
) -> Callable[[], object]:
    """The library's call with all its arguments, so that only it is timed; fills ``out``.

    ``x`` and ``out`` are what ``group``'s collective of that name takes and returns, of float32,
    float64 or int32 on the host. Pieces are as even as ``partition`` makes them; ``broadcast``
    leaves ``out`` alone and fills ``x``. What only the root has may be empty elsewhere.
    """
    assert x.dtype in DTYPES and not x.is_cuda, "the library knows no other types"
    comm, sent, taken = group.communicator, x.view(-1).numpy(), out.view(-1).numpy()
    if collective == "barrier":
        return comm.Barrier
    if collective == "broadcast":
        return partial(comm.Bcast, sent, root)
    if collective == "allreduce":
        return partial(comm.Allreduce, sent, taken, OPERATIONS[op])
    if collective == "reduce":
        return partial(comm.Reduce, sent, taken, OPERATIONS[op], root)
    whole = max(sent.size, taken.size)
    if collective == "alltoall":
        return partial(comm.Alltoall, sent, taken)
    even = whole % group.size == 0
    counts = [stop - start for start, stop in partition(whole, group.size)]
    if collective == "reduce_scatter":
        if even:
            return partial(comm.Reduce_scatter_block, sent, taken, OPERATIONS[op])
        return partial(comm.Reduce_scatter, sent, taken, counts, OPERATIONS[op])
    if collective == "allgather":
        if even:
            return partial(comm.Allgather, sent, taken)
        return partial(comm.Allgatherv, sent, [taken, counts])
    if collective == "gather":
        return partial(comm.Gatherv, sent, [taken, counts], root)
    assert collective == "scatter", collective
    return partial(comm.Scatterv, [sent, counts], taken, root)


def native(group: Group, collective: str, x: Tensor, *, op: str = "sum", root: int = 0) -> Tensor:
    """The same as ``getattr(group, collective)(x)``, by the library.

    Pieces are of one length; where only the root has a result it is empty elsewhere.
    """
    pieces = partition(x.numel(), group.size)
    lengths = {
        "reduce_scatter": pieces[group.rank][1] - pieces[group.rank][0],
        "scatter": pieces[group.rank][1] - pieces[group.rank][0],
        "allgather": x.numel() * group.size,
        "gather": x.numel() * group.size if group.rank == root else 0,
        "reduce": x.numel() if group.rank == root else 0,
    }
    if collective == "broadcast":
        x = out = x.clone()
    else:
        out = x.new_empty(lengths.get(collective, x.numel()))
    native_call(group, collective, x, out, op=op, root=root)()
    return out


def forced() -> str:
    """The settings in the environment that force an algorithm on the library, or ""."""
    found = [f"{name}={value}" for name, value in os.environ.items() if name.startswith(FORCING)]
    return " ".join(sorted(found))
