"""torch.distributed with gloo, what most people use without a GPU: the one place that imports it.

One process group a run, over the loopback where all ranks share a host, else over the interface in
GLOO_SOCKET_IFNAME or the host's first one.
"""

from __future__ import annotations

import datetime
import fcntl
import os
import socket
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
import torch.distributed as distributed
from torch import Tensor, nn
from torch._C._distributed_c10d import TCPStore
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    loss_parallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from mpmp.comm.world import World
from mpmp.errors import LaunchError
from mpmp.programs.partition import partition

_INTERFACE = "GLOO_SOCKET_IFNAME"
_SIOCGIFADDR = 0x8915


@contextmanager
def gloo(world: World, one_host: bool) -> Iterator[None]:
    """The process group of all ranks; all enter and leave together."""
    interface = os.environ.get(_INTERFACE) or ("lo" if one_host else _first_interface())
    os.environ[_INTERFACE] = interface
    limit = datetime.timedelta(seconds=world.limit_s)

    def store(address: str, port: int) -> TCPStore:
        return TCPStore(address, port, world.size, world.rank == 0, limit, wait_for_workers=False)

    own = store(_address(interface), 0) if world.rank == 0 else None
    said = "" if own is None else f"{own.host}:{own.port}"
    address, _, port = world.gather_texts(said)[0].rpartition(":")
    distributed.init_process_group(
        "gloo",
        store=own or store(address, int(port)),
        rank=world.rank,
        world_size=world.size,
        timeout=limit,
    )
    yield
    # Not in a `finally`: after an error on one rank the others would be waited for.
    distributed.destroy_process_group()


def _first_interface() -> str:
    for _, name in socket.if_nameindex():
        if name != "lo":
            try:
                _address(name)
            except LaunchError:
                continue
            return name
    raise LaunchError(f"gloo needs a network interface with an address; name one in {_INTERFACE}")


def _address(interface: str) -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        wanted = struct.pack("256s", interface.encode()[:15])
        try:
            return socket.inet_ntoa(fcntl.ioctl(asking, _SIOCGIFADDR, wanted)[20:24])
        except OSError as error:
            raise LaunchError(
                f"interface {interface} has no address ({error.strerror}); gloo takes another one "
                f"by its name in {_INTERFACE}"
            ) from error


def gloo_call(
    collective: str, x: Tensor, length: int, rank: int, size: int
) -> tuple[Callable[[], object], Tensor]:
    """A call of gloo on what a rank brings, ``x``, and the tensor in which its result stands.

    ``length`` counts the elements of the whole array; the root is rank 0.
    """
    start, stop = partition(length, size)[rank]
    piece, whole = x.new_zeros(stop - start), x.new_zeros(length)
    # Newer names; the older ones are deprecated since torch 2.13.
    scattered = getattr(distributed, "reduce_scatter_single", distributed.reduce_scatter_tensor)
    gathered = getattr(distributed, "all_gather_single", distributed.all_gather_into_tensor)
    pieces = list(whole.chunk(size)) if rank == 0 else None
    rooted = list(x.chunk(size)) if rank == 0 else None
    calls: dict[str, tuple[Callable[[], object], Tensor]] = {
        "allreduce": (lambda: distributed.all_reduce(x), x),
        "reduce_scatter": (lambda: scattered(piece, x), piece),
        "allgather": (lambda: gathered(whole, x), whole),
        "broadcast": (lambda: distributed.broadcast(x, 0), x),
        "reduce": (lambda: distributed.reduce(x, 0), x),
        "gather": (lambda: distributed.gather(x, pieces, 0), whole),
        "scatter": (lambda: distributed.scatter(piece, rooted, 0), piece),
        "alltoall": (lambda: distributed.all_to_all_single(whole, x), whole),
        "barrier": (lambda: distributed.barrier(), piece),
    }
    return calls[collective]


# --- training: the same module, cut by torch over all ranks ---------------------------------------


def data_parallel(model: nn.Module) -> nn.Module:
    """DDP: a replica on every rank."""
    return DistributedDataParallel(model, gradient_as_bucket_view=True)


def fully_sharded(model: nn.Module, blocks: Iterable[nn.Module]) -> None:
    """FSDP2: every block and the rest of the model cut into shards, in place."""
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def tensor_parallel(model: nn.Module) -> None:
    """DTensor: heads, hidden units and vocabulary cut, in place; logits stay cut over their last
    dim, for :func:`loss_of_cut_logits`."""
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    plan = {
        "embedding": RowwiseParallel(input_layouts=Replicate()),
        "blocks.*.attention.qkv": ColwiseParallel(),
        "blocks.*.attention.out": RowwiseParallel(),
        "blocks.*.mlp.up": ColwiseParallel(),
        "blocks.*.mlp.down": RowwiseParallel(),
        "output": ColwiseParallel(output_layouts=Shard(-1), use_local_output=False),
    }
    parallelize_module(model, mesh, plan)


def loss_of_cut_logits() -> AbstractContextManager[None]:
    """In here cross entropy, forward and backward, takes logits that are cut."""
    return loss_parallel()


def pipelined(
    stage: nn.Module, microbatches: int, loss: Callable[[Tensor, Tensor], Tensor]
) -> Callable[[Tensor, Tensor], Tensor | None]:
    """torch's own 1F1B: a step over inputs and targets, which gives the mean loss on the last rank.

    Gradients are means over the microbatches.
    """
    rank, size = distributed.get_rank(), distributed.get_world_size()
    made = PipelineStage(stage, rank, size, torch.device("cpu"))
    schedule = Schedule1F1B(made, n_microbatches=microbatches, loss_fn=loss)

    def step(inputs: Tensor, targets: Tensor) -> Tensor | None:
        losses: list[Tensor] = []
        last = rank == size - 1
        tensors = (inputs,) if rank == 0 else ()
        schedule.step(*tensors, target=targets if last else None, losses=losses if last else None)
        return torch.stack(losses).mean() if last else None

    return step
