"""A run's folder: the names in it, and changes that survive a crash.

It looks like this:

    runs/default/
      step_00000012/       a checkpoint: the manifest, and a shard of each rank that wrote a part
      step_00000012.2/     the same step saved again; the first stays until this one is whole
      step_00000024.tmp/   being written, or left by a job that was killed while it wrote
      latest               text: the folder saved last, for people and scripts
      .lock                held by the job that runs here
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
from collections.abc import Collection
from pathlib import Path

from mpmp.checkpoint import manifest
from mpmp.checkpoint.blocks import open_plain
from mpmp.checkpoint.manifest import Manifest
from mpmp.checkpoint.points import point
from mpmp.errors import CheckpointError, InputOutputError

LATEST = "latest"
_STEP = re.compile(r"step_([0-9]{8,18})(\.[0-9]{1,9})?")
_UNFINISHED = re.compile(_STEP.pattern + r"\.tmp")


def step_name(step: int) -> str:
    return f"step_{step:08}"


def free_name(folder: Path, step: int) -> str:
    """Name of a step's folder that is not taken yet, nor by what a dead save has left."""
    name, number = step_name(step), 1
    while os.path.lexists(folder / name) or os.path.lexists(folder / f"{name}.tmp"):
        number += 1
        name = f"{step_name(step)}.{number}"
    return name


def step_folders(folder: Path) -> list[str]:
    """Names of all checkpoints, good or bad, by name; none where there is no folder."""
    return _names(folder, _STEP)


def unfinished(folder: Path) -> list[str]:
    """Names of folders left by saves that did not end."""
    return _names(folder, _UNFINISHED)


def _names(folder: Path, pattern: re.Pattern[str]) -> list[str]:
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    return sorted(name for name in names if pattern.fullmatch(name))


def read_manifest(step_folder: Path) -> tuple[str, Manifest]:
    """The manifest of a checkpoint, as text and understood; CheckpointError where it is bad."""
    if not stat.S_ISDIR(os.lstat(step_folder).st_mode):
        raise CheckpointError("is not a folder but a file or a symbolic link")
    try:
        with open_plain(str(step_folder / manifest.FILE)) as file:
            if os.fstat(file.fileno()).st_size > manifest.LONGEST_BYTES:
                raise CheckpointError(f"has a manifest of more than {manifest.LONGEST_BYTES} bytes")
            text = file.read().decode("ascii")
    except FileNotFoundError:
        raise CheckpointError("has no manifest") from None
    except UnicodeDecodeError:
        raise CheckpointError("has a damaged manifest: it is not text") from None
    found = manifest.parse(text)
    said = _STEP.fullmatch(step_folder.name)
    if said is None or int(said[1]) != found.step:
        raise CheckpointError(f"holds step {found.step}, so the folder was renamed")
    return text, found


def require_room(unfinished: Path, size_bytes: int, free_bytes: int) -> None:
    """Raise InputOutputError where what is to be written to a step's folder has no room."""
    if size_bytes > free_bytes:
        raise InputOutputError(
            f"{unfinished.stem} needs {size_bytes / 1e6:,.2f} MB but {unfinished.parent} has room "
            f"for {free_bytes / 1e6:,.2f} MB; make room or choose another folder"
        )


# --- changes ------------------------------------------------------------------------------------


def write_durably(path: Path, text: str) -> None:
    """Write a new file and have it on the disk."""
    with open(path, "w", encoding="ascii") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def replace_durably(path: Path, text: str) -> None:
    """Give a file new content: whenever the job is killed, it holds the old or the new."""
    aside = path.with_name(path.name + ".tmp")
    try:
        write_durably(aside, text)
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Have the names in a folder on the disk; without it a rename may be lost with the power."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that cannot
            raise
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a folder and all in it (of a link the link alone); nothing where nothing is."""
    try:
        if stat.S_ISDIR(os.lstat(path).st_mode):
            shutil.rmtree(path)
        else:
            os.unlink(path)
    except FileNotFoundError:
        pass


def prune(folder: Path, keep: int, distrusted: Collection[str] = ()) -> list[str]:
    """Remove the checkpoints that are :func:`doomed`, and what unfinished saves have left.

    Returns the names of those removed.
    """
    names = doomed(folder, keep, distrusted)
    for name in names:
        # Renamed first, so that what is left by a kill half-way is not taken for a checkpoint.
        os.rename(folder / name, folder / f"{name}.tmp")
        point("pruning")
        remove(folder / f"{name}.tmp")
    for name in unfinished(folder):
        remove(folder / name)
    return names


def doomed(folder: Path, keep: int, distrusted: Collection[str] = ()) -> list[str]:
    """Names of the checkpoints that are older than the ``keep`` saved last.

    One whose shards are missing or of a wrong length does not count and goes, too; one that is
    ``distrusted`` does not count, and goes when it is too old; one whose manifest cannot be read
    stays, for a later mpmp may have written it.
    """
    whole: list[tuple[int, str]] = []
    found: list[str] = []
    for name in step_folders(folder):
        try:
            one = read_manifest(folder / name)[1]
            is_whole = all(
                _length(folder / name / file) == said.size_bytes for file, said in one.files.items()
            )
        except (CheckpointError, OSError):
            continue
        if is_whole:
            whole.append((one.serial, name))
        else:
            found.append(name)
    kept = sorted(one for one in whole if one[1] not in distrusted)[-keep:]
    return found + [one[1] for one in sorted(whole) if [one] < kept[:1]]


def _length(path: Path) -> int:
    try:
        return os.lstat(path).st_size
    except FileNotFoundError:
        return -1
