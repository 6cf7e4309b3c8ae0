"""The whole model brought together from its shards, on rank 0.

Each tensor's primary shards travel to rank 0 and are put where their
placements say: the inverse of every cut. Initial weights, verify and exported files use it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

import torch
from torch import Tensor

from mpmp.comm.agreement import exchange
from mpmp.comm.mesh import Mesh
from mpmp.parallel.placement import Placement


def merge(tensors: Mapping[str, tuple[Placement, Tensor]], mesh: Mesh) -> dict[str, Tensor]:
    """Global tensors by name, on the host, on rank 0; empty on the others.

    ``tensors`` maps global names to this rank's shard of a tensor of the same placement.
    """
    group, device = mesh.everyone, mesh.world.device
    own = {
        name: (placement, shard)
        for name, (placement, shard) in tensors.items()
        if placement.primary
    }
    table = json.dumps(
        [
            (name, placement.shape, placement.ranges, str(shard.dtype).removeprefix("torch."))
            for name, (placement, shard) in own.items()
        ]
    )
    tables = [json.loads(text) for text in exchange(table, mesh)]
    if group.rank != 0:
        for placement, shard in own.values():
            assert tuple(shard.shape) == placement.local_shape
            group.send(shard.detach().contiguous(), 0, 0).wait()
        return {}
    merged: dict[str, Tensor] = {}
    for name, (placement, shard) in own.items():
        _put(merged, name, placement.shape, placement.ranges, shard.detach())
    for source, entries in enumerate(tables):
        if source == 0:
            continue
        for name, shape, ranges, dtype in entries:
            shard = torch.empty(
                [stop - start for start, stop in ranges], dtype=getattr(torch, dtype), device=device
            )
            group.receive(shard, source, 0).wait()
            _put(merged, name, shape, ranges, shard)
    return dict(sorted(merged.items()))


def _put(
    merged: dict[str, Tensor],
    name: str,
    shape: tuple[int, ...],
    ranges: tuple[tuple[int, int], ...],
    shard: Tensor,
) -> None:
    if name not in merged:
        merged[name] = torch.empty(tuple(shape), dtype=shard.dtype)
    merged[name][tuple(slice(start, stop) for start, stop in ranges)] = shard.cpu()


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of named tensors, in the order of their names."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        sha.update(f"{name} {tuple(tensors[name].shape)} {tensors[name].dtype}".encode())
        sha.update(tensors[name].contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()
