"""Loading: the newest step that is good on all ranks, into whatever each of them wants of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpmp.checkpoint import folder as run_folder
from mpmp.checkpoint import manifest, tensorfile
from mpmp.checkpoint.blocks import BLOCK_BYTES, Fingerprint, open_plain
from mpmp.checkpoint.contents import Contents, File, Piece, Stored
from mpmp.checkpoint.dealing import DamageError, read
from mpmp.checkpoint.extents import volume, whole
from mpmp.checkpoint.held import Held
from mpmp.checkpoint.manifest import NewerFormatError
from mpmp.comm.agreement import on_first, reason, together
from mpmp.errors import CheckpointError

if TYPE_CHECKING:
    from mpmp.comm.mesh import Mesh


@dataclass(frozen=True)
class Found:
    """A checkpoint whose manifest is good: what it says of itself, the same on all ranks."""

    path: Path
    step: int
    layout: str
    meta: dict[str, Any]
    contents: Contents


Wants = Callable[[Found], Sequence[Held]]
"""What this rank wants of a checkpoint, by what was found; the tensors are filled."""


@dataclass(frozen=True)
class Loaded:
    """What was loaded, the same on all ranks but for the bytes that this one has read."""

    path: Path
    step: int
    layout: str
    meta: dict[str, Any]
    skipped: tuple[str, ...]
    """One sentence for each checkpoint that was passed over."""
    damaged: tuple[str, ...]
    """Names of those whose files are not what they were."""
    read_bytes: int


def load(folder: Path, wants: Wants, mesh: Mesh) -> Loaded:
    """Fill tensors from the newest good checkpoint of a run's folder; all ranks together.

    Raises CheckpointError, on every rank alike, where there is none (saying why each one is not),
    and what ``wants`` raises on any rank.
    """
    names, skipped = _survey(folder, mesh)
    damaged: list[str] = []
    for name in names:
        found = look_at(folder / name, mesh)
        held = _agreed(wants, found, mesh)
        try:
            read_bytes = read(found.contents, held, mesh)
        except DamageError as error:
            skipped.append(f"{name}: {error}")
            damaged.append(name)
            continue
        said = found.path, found.step, found.layout, found.meta
        return Loaded(*said, tuple(skipped), tuple(damaged), read_bytes)
    raise _none_good(folder, skipped)


def newest(folder: Path, mesh: Mesh) -> Found:
    """What the newest checkpoint with a good manifest says of itself; all ranks together.

    Nothing of its tensors was read or verified. Raises as :func:`load`.
    """
    names, skipped = _survey(folder, mesh)
    if not names:
        raise _none_good(folder, skipped)
    return look_at(folder / names[0], mesh)


def look_at(path: Path, mesh: Mesh) -> Found:
    """What a step says of itself; all ranks together. CheckpointError where it is not good."""
    # Rank 0's text on all ranks: they cannot see different manifests.
    text = on_first(f"read {path}", lambda: run_folder.read_manifest(path)[0], mesh)
    one = manifest.parse(text)
    return Found(path, one.step, one.layout, dict(one.meta), one.contents(path))


def read_step(path: Path, contents: Contents, held: Sequence[Held], mesh: Mesh) -> None:
    """Fill tensors from one step and no other; all ranks together, and raises as :func:`read`."""
    try:
        read(contents, held, mesh)
    except DamageError as error:
        raise DamageError(f"{path}: {error}; name an older step's folder") from None


def _agreed(wants: Wants, found: Found, mesh: Mesh) -> list[Held]:
    """What is wanted of a checkpoint; an error on any rank is one of all."""
    held: list[Held] = []
    together(f"take {found.path}", lambda: held.extend(wants(found)), mesh)
    return held


def tensor_files(paths: Sequence[Path], mesh: Mesh) -> Contents:
    """What plain safetensors files hold, by the tensors' names; all ranks together.

    Links are followed. Raises CheckpointError where a header is not one that the file can have, or
    where two files hold a tensor of one name.
    """

    def look() -> list[Any]:
        said: list[Any] = []
        for path in paths:
            try:
                said.append(_header(path))
            except CheckpointError as error:
                raise CheckpointError(f"{path} {error}") from None
        return said

    files: list[File] = []
    tensors: dict[str, Stored] = {}
    for number, (path, size, entries) in enumerate(on_first("read tensor files", look, mesh)):
        files.append(File(Path(path), Fingerprint(size, BLOCK_BYTES, ())))
        for name, dtype, shape, offset in entries:
            if name in tensors:
                raise CheckpointError(f"{path} holds {name!r}, and so does a file before it")
            box = whole(tuple(shape))
            pieces = (Piece(number, offset, box, 0, volume(box)),)
            tensors[name] = Stored(tensorfile.DTYPES[dtype], tuple(shape), pieces)
    return Contents(tuple(files), tensors)


def _header(path: Path) -> list[Any]:
    """Where a file is, its length, and the tensors it holds, in JSON's types."""
    try:
        real = path.resolve()
    except RuntimeError:  # what pathlib raises up to Python 3.12
        raise CheckpointError("is a symbolic link to itself") from None
    with open_plain(str(real)) as file:
        size = os.fstat(file.fileno()).st_size
        entries = tensorfile.read_entries(file.read, size)
    told = [[one.name, tensorfile.NAMES[one.dtype], one.shape, one.offset] for one in entries]
    return [str(real), size, told]


def _survey(folder: Path, mesh: Mesh) -> tuple[list[str], list[str]]:
    """Checkpoints with a good manifest, the one saved last first; a sentence for each other one."""

    def look() -> tuple[list[str], list[str]]:
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

    names, skipped = on_first(f"read {folder}", look, mesh)
    return list(names), list(skipped)


def _none_good(folder: Path, skipped: Sequence[str]) -> CheckpointError:
    if skipped:
        return CheckpointError(f"no good checkpoint in {folder}: {'; '.join(skipped)}")
    return CheckpointError(f"no checkpoint in {folder}; start without --checkpoint.resume")
