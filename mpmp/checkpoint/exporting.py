"""The merged model as one safetensors file, as other programs read it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from mpmp.checkpoint.blocks import write_file
from mpmp.checkpoint.folder import sync_folder
from mpmp.checkpoint.tensorfile import host_bytes, kind_of, lay_out
from mpmp.comm.agreement import on_first

if TYPE_CHECKING:
    from mpmp.comm.mesh import Mesh


def export(
    path: Path, merged: Mapping[str, Tensor], metadata: Mapping[str, str], mesh: Mesh
) -> None:
    """Rank 0 writes its ``merged`` tensors to a file; all ranks together.

    The file is the old one or the new one, never a part; InputOutputError on every rank alike.
    """
    on_first(f"write {path}", lambda: write_tensors(path, merged, metadata), mesh)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Give a safetensors file new content: whenever the job is killed, it holds the old or new."""
    kinds = {name: kind_of(name, one) for name, one in tensors.items()}
    header, entries = lay_out(kinds, metadata)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.unlink(missing_ok=True)
    try:
        write_file(
            unfinished, [memoryview(header), *(host_bytes(tensors[one.name]) for one in entries)]
        )
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)
