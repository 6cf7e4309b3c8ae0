"""Saving: shards, manifest, rename, ``latest``, prune; at no point is there no good checkpoint.

all ranks   see the empty step_N.tmp that rank 0 made, and that there is room
replica 0   each rank writes and fsyncs its shard, hashing on the way
all ranks   agree that all have written
rank 0      manifest, fsync; rename to step_N, fsync; move latest, fsync; prune
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mpmp.checkpoint import folder as run_folder
from mpmp.checkpoint import manifest, tensorfile
from mpmp.checkpoint.blocks import BlockWriter
from mpmp.checkpoint.manifest import Manifest
from mpmp.comm.agreement import AGREED, on_first, together
from mpmp.config import parse_layout
from mpmp.errors import CheckpointError, InputOutputError

if TYPE_CHECKING:
    from mpmp.comm.mesh import Mesh


def save(
    folder: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    meta: Mapping[str, Any],
    mesh: Mesh,
    keep: int,
) -> Path:
    """Save every rank's tensors as a step's checkpoint, all ranks together; returns its folder.

    ``tensors`` is what this rank of the model holds (replicas hold the same; the first writes);
    ``meta`` is of JSON, and rank 0's is kept; ``keep`` checkpoints stay in ``folder``, this one
    among them. Raises InputOutputError on every rank alike, and then leaves nothing behind.
    """
    # As it will be read back; a value that JSON does not know is an error on every rank at once.
    meta = json.loads(json.dumps(meta, allow_nan=False))
    name, serial = on_first(f"prepare {folder} for a save", lambda: _prepare(folder, step), mesh)
    path: Path = folder / name
    unfinished = folder / f"{name}.tmp"
    layout = parse_layout(mesh.layout)
    different = manifest.written_axes(layout)
    writes = all(place == 0 for axis, place in mesh.index.items() if axis not in different)
    shard = manifest.shard_name(mesh.index, layout)
    metadata = {"step": str(step), "layout": mesh.layout}
    try:
        _require_room(
            unfinished, lambda: tensorfile.size_bytes(tensors, metadata) if writes else 0, mesh
        )
        written = together(
            f"write {unfinished / shard}",
            lambda: [shard, _write(unfinished / shard, tensors, metadata)] if writes else None,
            mesh,
        )
        prints = {one[0]: manifest.fingerprint(one[1]) for one in written if one is not None}
        whole = Manifest(step, serial, mesh.layout, prints, meta)
        on_first(f"finish {path}", lambda: _publish(folder, name, whole), mesh)
    except AGREED:
        if mesh.everyone.rank == 0:
            shutil.rmtree(unfinished, ignore_errors=True)
        raise
    on_first(f"remove old checkpoints of {folder}", lambda: run_folder.prune(folder, keep), mesh)
    return path


def _prepare(folder: Path, step: int) -> tuple[str, int]:
    """Make the empty folder of a save; its name and the save's serial number."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in run_folder.unfinished(folder):
        run_folder.remove(folder / name)
    serial = 0
    for name in run_folder.step_folders(folder):
        try:
            serial = max(serial, run_folder.read_manifest(folder / name)[1].serial)
        except (CheckpointError, OSError):
            pass  # loading says what is wrong with it
    name = run_folder.free_name(folder, step)
    (folder / f"{name}.tmp").mkdir()
    return name, serial + 1


def _require_room(unfinished: Path, needed: Callable[[], int], mesh: Mesh) -> None:
    """Raise InputOutputError on all ranks where the shards would not fit on the disk."""

    def look() -> list[int]:
        if not unfinished.is_dir():
            raise InputOutputError(
                f"rank {mesh.everyone.rank} does not see {unfinished}, which rank 0 made; "
                "--checkpoint.dir must lie on a file system that all hosts share"
            )
        return [needed(), shutil.disk_usage(unfinished).free]

    seen = together(f"look for room in {unfinished}", look, mesh)
    total, free = sum(one[0] for one in seen), min(one[1] for one in seen)
    if total > free:
        raise InputOutputError(
            f"{unfinished.stem} needs {total / 1e6:,.2f} MB but {unfinished.parent} has room for "
            f"{free / 1e6:,.2f} MB; make room or choose another --checkpoint.dir"
        )


def _write(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> dict[str, Any]:
    with open(path, "xb") as file:
        writer = BlockWriter(file)
        tensorfile.write(tensors, metadata, writer.write)
        return manifest.describe(writer.finish())


def _publish(folder: Path, name: str, whole: Manifest) -> None:
    unfinished = folder / f"{name}.tmp"
    run_folder.write_durably(unfinished / manifest.FILE, whole.to_text())
    run_folder.sync_folder(unfinished)
    os.rename(unfinished, folder / name)
    run_folder.sync_folder(folder)
    run_folder.replace_durably(folder / run_folder.LATEST, f"{name}\n")
