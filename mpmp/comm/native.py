"""The MPI library's own collectives on float32 host tensors: what bench compares ours with."""

from __future__ import annotations

import torch
from torch import Tensor

from mpmp.comm.group import Group
from mpmp.comm.mpi import MPI
from mpmp.programs.partition import partition


def native(group: Group, collective: str, x: Tensor) -> Tensor:
    """The same as ``getattr(group, collective)(x)``, by the library; x is float32 on the host.

    ``allgather`` takes pieces of one length, ``broadcast`` sends rank 0's tensor.
    """
    assert x.dtype is torch.float32 and not x.is_cuda
    comm = group.communicator
    if collective == "allreduce":
        out = torch.empty_like(x)
        comm.Allreduce(x.numpy(), out.numpy(), op=MPI.SUM)
    elif collective == "reduce_scatter":
        counts = [stop - start for start, stop in partition(x.numel(), group.size)]
        out = x.new_empty(counts[group.rank])
        comm.Reduce_scatter(x.numpy(), out.numpy(), counts, op=MPI.SUM)
    elif collective == "allgather":
        out = x.new_empty(x.numel() * group.size)
        comm.Allgather(x.numpy(), out.numpy())
    else:
        assert collective == "broadcast", collective
        out = x.clone()
        comm.Bcast(out.numpy(), root=0)
    return out
