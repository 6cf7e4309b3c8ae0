"""What can be wrong with a checkpoint's files: each by name, what does it, words of the message.

Each is done to the folder of a step, beside which its run has another one. Manifests that lie with
the right hashes stand in ``forgeries.py``.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

Work = Callable[[Path], object]
MANIFEST = "manifest.json"


def shards(step: Path) -> list[Path]:
    return sorted(step.glob("shard_*"))


def first(step: Path) -> Path:
    return shards(step)[0]


def flip(path: Path, bit: int) -> None:
    """Turn one bit of a file over."""
    with path.open("r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


def places(step: Path, number: int, seed: int) -> list[tuple[Path, int]]:
    """Random bits of all files of a step, the manifest included."""
    files = sorted(path for path in step.iterdir() if path.is_file())
    sizes = [path.stat().st_size for path in files]
    chance = random.Random(seed)
    return [
        (path, chance.randrange(8 * path.stat().st_size))
        for path in chance.choices(files, weights=sizes, k=number)
    ]


# --- files that are not what they were ------------------------------------------------------------


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def lengthen(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\0")


def empty(path: Path) -> None:
    os.truncate(path, 0)


def zeros(path: Path) -> None:
    """As long as it was: what some file systems leave of a file after a loss of power."""
    size = path.stat().st_size
    os.truncate(path, 0)
    os.truncate(path, size)


def pickle(path: Path) -> None:
    torch.save({"weight": torch.zeros(3)}, path)


def pickle_as_long(path: Path) -> None:
    size = path.stat().st_size
    pickle(path)
    os.truncate(path, size)


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def link(path: Path) -> None:
    """To the very bytes that were saved, which lie elsewhere."""
    moved = outside(path) / path.name
    path.rename(moved)
    path.symlink_to(moved)


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def socket_or_device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def outside(path: Path) -> Path:
    """A folder beside the run's."""
    found = next(one for one in path.parents if one.name.startswith("step_")).parent.parent
    found = found / "outside"
    found.mkdir(exist_ok=True)
    return found


def other_step(step: Path) -> Path:
    return next(one for one in sorted(step.parent.glob("step_*")) if one != step)


def of_another_step(path: Path) -> None:
    shutil.copy(other_step(path.parent) / path.name, path)


def renamed(path: Path) -> None:
    path.rename(path.with_name("shard_00099.safetensors"))


def swapped(step: Path) -> None:
    one, other = shards(step)[:2]
    one.rename(step / "aside")
    other.rename(one)
    (step / "aside").rename(other)


def doubled(step: Path) -> None:
    one, other = shards(step)[:2]
    shutil.copy(one, other)


FILES: dict[str, tuple[Work, str]] = {
    "shard: a bit of its header": (lambda s: flip(first(s), 100), "block 0 of"),
    "shard: its last bit": (lambda s: flip(first(s), 8 * first(s).stat().st_size - 1), "SHA-256"),
    "shard: cut by a byte": (lambda s: cut(first(s)), "bytes and was saved with"),
    "shard: longer by a byte": (lambda s: lengthen(first(s)), "bytes and was saved with"),
    "shard: empty": (lambda s: empty(first(s)), "has 0 bytes"),
    "shard: zeros": (lambda s: zeros(first(s)), "SHA-256"),
    "shard: missing": (lambda s: first(s).unlink(), "No such file"),
    "shard: renamed": (lambda s: renamed(first(s)), "No such file"),
    "shard: of another step": (lambda s: of_another_step(first(s)), "SHA-256"),
    "shard: a pickle": (lambda s: pickle(first(s)), "bytes and was saved with"),
    "shard: a pickle as long": (lambda s: pickle_as_long(first(s)), "SHA-256"),
    "shard: a folder": (lambda s: folder(first(s)), "not a regular file"),
    "shard: a link to itself elsewhere": (lambda s: link(first(s)), "symbolic link"),
    "shard: a pipe": (lambda s: pipe(first(s)), "not a regular file"),
    "shard: a link to a device": (lambda s: socket_or_device(first(s)), "symbolic link"),
    "shards: swapped": (swapped, "shard_00000.safetensors"),
    "shards: one twice": (doubled, "shard_00001.safetensors"),
    "manifest: a bit": (lambda s: flip(s / MANIFEST, 2000), "manifest"),
    "manifest: cut by a byte": (lambda s: cut(s / MANIFEST), "manifest"),
    "manifest: longer by a byte": (lambda s: lengthen(s / MANIFEST), "manifest"),
    "manifest: empty": (lambda s: empty(s / MANIFEST), "manifest"),
    "manifest: zeros": (lambda s: zeros(s / MANIFEST), "manifest"),
    "manifest: missing": (lambda s: (s / MANIFEST).unlink(), "has no manifest"),
    "manifest: of another step": (lambda s: of_another_step(s / MANIFEST), "so the folder was"),
    "manifest: a pickle": (lambda s: pickle(s / MANIFEST), "manifest"),
    "manifest: a folder": (lambda s: folder(s / MANIFEST), "not a regular file"),
    "manifest: a link to itself elsewhere": (lambda s: link(s / MANIFEST), "symbolic link"),
    "manifest: a pipe": (lambda s: pipe(s / MANIFEST), "not a regular file"),
    "manifest: huge": (lambda s: os.truncate(s / MANIFEST, 1 << 40), "manifest"),
}
"""Damage to files."""


# --- the folder itself ----------------------------------------------------------------------------


def folder_is_link(step: Path) -> None:
    moved = outside(step / "x") / step.name
    step.rename(moved)
    step.symlink_to(moved)


def folder_is_file(step: Path) -> None:
    shutil.rmtree(step)
    step.write_text("text")


def folder_is_empty(step: Path) -> None:
    shutil.rmtree(step)
    step.mkdir()


FOLDERS: dict[str, tuple[Work, str]] = {
    "folder: a link": (folder_is_link, "symbolic link"),
    "folder: a file": (folder_is_file, "not a folder"),
    "folder: empty": (folder_is_empty, "has no manifest"),
    "folder: renamed": (
        lambda s: s.rename(s.with_name("step_00000021")),
        "so the folder was renamed",
    ),
}


def snapshot(top: Path) -> dict[str, tuple[int, int, int]]:
    """Everything under a folder: kinds, lengths and times of change."""
    found = {}
    for path in sorted(top.rglob("*")):
        said = path.lstat()
        found[str(path)] = (said.st_mode, said.st_size, said.st_mtime_ns)
    return found
