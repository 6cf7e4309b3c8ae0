"""Loading: every rank verifies its own shard, and all take the newest step that is good on all."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mpmp.checkpoint import folder as run_folder
from mpmp.checkpoint import manifest, tensorfile
from mpmp.checkpoint.blocks import BlockReader, open_plain
from mpmp.checkpoint.manifest import Manifest, NewerFormatError
from mpmp.comm.agreement import on_first, reason, together
from mpmp.config import parse_layout
from mpmp.errors import CheckpointError, LayoutError

if TYPE_CHECKING:
    from mpmp.comm.mesh import Mesh


@dataclass(frozen=True)
class Loaded:
    """What was saved: this rank's tensors (on the host), and the meta, the same on all ranks."""

    step: int
    tensors: dict[str, Tensor]
    meta: dict[str, Any]
    path: Path
    skipped: tuple[str, ...]
    """One sentence for each checkpoint that was passed over, the same on all ranks."""


def load(folder: Path, mesh: Mesh) -> Loaded:
    """The newest good checkpoint of a run's folder; all ranks together.

    Raises, on every rank alike, CheckpointError where there is none (saying why each one is not),
    LayoutError where it is of another layout.
    """
    names, skipped = on_first(f"read {folder}", lambda: _survey(folder), mesh)
    for name in names:
        found = _try(folder / name, tuple(skipped), mesh)
        if isinstance(found, Loaded):
            return found
        skipped.append(found)
    if skipped:
        raise CheckpointError(f"no good checkpoint in {folder}: {'; '.join(skipped)}")
    raise CheckpointError(f"no checkpoint in {folder}; start without --checkpoint.resume")


def _try(path: Path, skipped: tuple[str, ...], mesh: Mesh) -> Loaded | str:
    """A checkpoint, or why it is no good on some rank; the same on all ranks."""
    # Rank 0's text on all ranks: they cannot see different manifests.
    text = on_first(f"read {path}", lambda: run_folder.read_manifest(path)[0], mesh)
    whole = manifest.parse(text)
    if whole.layout != mesh.layout:
        raise LayoutError(
            f"{path} was saved with layout {whole.layout} and this job has {mesh.layout}; this "
            f"version resumes on the same layout only: start as many ranks with --layout "
            f"{whole.layout}, or choose another --checkpoint.dir"
        )
    tensors: dict[str, Tensor] = {}
    faults = together(f"read {path}", lambda: _read_shard(path, whole, tensors, mesh), mesh)
    for rank, fault in enumerate(faults):
        if fault is not None:
            return f"{path.name} on rank {rank}: {fault}"
    return Loaded(whole.step, tensors, dict(whole.meta), path, skipped)


def _survey(folder: Path) -> tuple[list[str], list[str]]:
    """Checkpoints with a good manifest, the one saved last first; a sentence for each other one."""
    good: list[tuple[int, str]] = []
    bad: list[str] = []
    for name in run_folder.step_folders(folder):
        try:
            good.append((run_folder.read_manifest(folder / name)[1].serial, name))
        except NewerFormatError as error:
            raise NewerFormatError(f"{folder / name} {error}") from None
        except CheckpointError as error:
            bad.append(f"{name} {error}")
        except OSError as error:
            bad.append(f"{name} cannot be read: {reason(error, '')}")
    return [name for _, name in sorted(good, reverse=True)], bad


def _read_shard(path: Path, whole: Manifest, tensors: dict[str, Tensor], mesh: Mesh) -> str | None:
    """Fill ``tensors`` from this rank's shard; what is wrong with it, or None."""
    shard = manifest.shard_name(mesh.index, parse_layout(mesh.layout))
    expected = whole.shards[shard]
    try:
        # The folder by descriptor: not even a link put in its place meanwhile is followed.
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            file = open_plain(shard, folder)
        finally:
            os.close(folder)
        with file:
            size = os.fstat(file.fileno()).st_size
            if size != expected.size_bytes:
                raise CheckpointError(f"has {size} bytes and was saved with {expected.size_bytes}")
            reader = BlockReader(file, expected)
            tensors.update(tensorfile.read(reader.fill, expected.size_bytes))
    except CheckpointError as error:
        return f"{shard} {error}"
    except OSError as error:
        return f"{shard} cannot be read: {reason(error, '')}"
    return None
