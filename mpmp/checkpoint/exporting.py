"""The merged model as one safetensors file, as other programs read it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from mpmp.checkpoint import tensorfile
from mpmp.checkpoint.blocks import BlockWriter
from mpmp.checkpoint.folder import sync_folder
from mpmp.comm.agreement import on_first

if TYPE_CHECKING:
    from mpmp.comm.mesh import Mesh


def export(
    path: Path, merged: Mapping[str, Tensor], metadata: Mapping[str, str], mesh: Mesh
) -> None:
    """Rank 0 writes its ``merged`` tensors to a file; all ranks together.

    The file is the old one or the new one, never a part; InputOutputError on every rank alike.
    """
    on_first(f"write {path}", lambda: _write(path, merged, metadata), mesh)


def _write(path: Path, merged: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".tmp")
    try:
        with open(unfinished, "wb") as file:
            writer = BlockWriter(file)
            tensorfile.write(merged, metadata, writer.write)
            writer.finish()
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)
