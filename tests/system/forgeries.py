"""Manifests that lie, all hashes right: what an attacker, or a bug of ours, could have written."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from mpmp.checkpoint import manifest
from system.damages import MANIFEST, Work


def forge(change: Callable[[dict[str, Any]], object], step: Path) -> None:
    """Change a manifest and give it the hash that it then has."""
    path = step / MANIFEST
    content = json.loads(path.read_text())
    del content["sha256"]
    change(content)
    content["sha256"] = manifest._digest(content)
    path.write_text(manifest._canonical(content))


def shard(content: dict[str, Any]) -> dict[str, Any]:
    found = content["files"]["shard_00000.safetensors"]
    assert isinstance(found, dict)
    return found


def in_meta(name: str, value: object) -> Callable[[dict[str, Any]], object]:
    return lambda content: content["meta"].update({name: value})


def tensor(content: dict[str, Any]) -> dict[str, Any]:
    """One that lies in two pieces at least."""
    tensors: dict[str, dict[str, Any]] = content["tensors"]
    return next(one for _, one in sorted(tensors.items()) if len(one["pieces"]) > 1)


def rename_shard(to: str) -> Callable[[dict[str, Any]], object]:
    def change(content: dict[str, Any]) -> None:
        content["files"][to] = content["files"].pop("shard_00000.safetensors")

    return change


def piece(number: int, value: object) -> Callable[[dict[str, Any]], object]:
    def change(content: dict[str, Any]) -> None:
        tensor(content)["pieces"][0][number] = value

    return change


def one_piece_twice(content: dict[str, Any]) -> None:
    """As many elements as before, half of them twice and the others never."""
    for one in content["tensors"].values():
        file, offset, start, stop, box = one["pieces"][0]
        if stop > start and (stop - start) % 2 == 0:
            half = [file, offset, start, (start + stop) // 2, box]
            one["pieces"][:1] = [half, half]
            return
    raise AssertionError("no piece has an even number of elements")


CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "no step": lambda c: c.pop("step"),
    "step is text": lambda c: c.update(step="20"),
    "step is true": lambda c: c.update(step=True),
    "negative step": lambda c: c.update(step=-20),
    "huge step": lambda c: c.update(step=10**30),
    "format is text": lambda c: c.update(format="2"),
    "format 0": lambda c: c.update(format=0),
    "format 1": lambda c: c.update(format=1),
    "layout is a number": lambda c: c.update(layout=3),
    "meta is a list": lambda c: c.update(meta=[]),
    **{
        f"meta {name} is {value!r:.18}": in_meta(name, value)
        for name, values in {
            "config": ([1], {"model": 3}, {"parallel": {"schedule": 3}}, {"train": {"batch": "x"}}),
            "tags": (3, [[]]),
            "optimizer": ([], {"updates": "x"}, {"updates": 10**30}, {"updates": -1}),
            "scale": (1, {"value": None}, {"value": -2.0}, {"good": -1.0}),
            "cut": (3,),
            "elapsed_s": (None, 10**400, float("nan"), -0.5),
        }.items()
        for value in values
    },
    "files is a list": lambda c: c.update(files=["shard_00000.safetensors"]),
    "files is a number": lambda c: c.update(files=3),
    "file is null": lambda c: c["files"].update({"shard_00000.safetensors": None}),
    "no files": lambda c: c.update(files={}),
    "file above": rename_shard("../step_00000010/shard_00000.safetensors"),
    "file far above": rename_shard("../../../../etc/passwd"),
    "file in a folder": rename_shard("x/shard_00000.safetensors"),
    "absolute file": rename_shard("/etc/shard_00000.safetensors"),
    "file is the manifest": rename_shard("manifest.json"),
    "file with a NUL": rename_shard("shard_00000.safetensors\0.txt"),
    "file with no name": rename_shard(""),
    "size is a fraction": lambda c: shard(c).update(bytes=1.5),
    "huge size": lambda c: shard(c).update(bytes=1 << 80),
    "large size": lambda c: shard(c).update(bytes=1 << 50),
    "negative size": lambda c: shard(c).update(bytes=-1),
    "no block size": lambda c: shard(c).update(block_bytes=0),
    "block of the whole memory": lambda c: shard(c).update(block_bytes=1 << 50),
    "a block too few": lambda c: shard(c)["sha256"].pop(),
    "a block too many": lambda c: shard(c)["sha256"].append("00"),
    "blocks are numbers": lambda c: shard(c).update(sha256=[1, 2, 3]),
    "blocks are text": lambda c: shard(c).update(sha256="abc"),
    "no hashes": lambda c: shard(c).update(sha256=[]),
    "hashes of another file": lambda c: shard(c).update(
        sha256=c["files"]["shard_00001.safetensors"]["sha256"]
    ),
    "tensors is a list": lambda c: c.update(tensors=[]),
    "tensor is null": lambda c: c["tensors"].update({next(iter(c["tensors"])): None}),
    "unknown dtype": lambda c: tensor(c).update(dtype="F7"),
    "shape is text": lambda c: tensor(c).update(shape="abc"),
    "huge shape": lambda c: tensor(c).update(shape=[1 << 40, 1 << 40]),
    "shape of zeros and huge": lambda c: tensor(c).update(shape=[0, 1 << 61]),
    "negative shape": lambda c: tensor(c).update(shape=[-4]),
    "no pieces": lambda c: tensor(c).update(pieces=[]),
    "a piece too few": lambda c: tensor(c)["pieces"].pop(),
    "one piece twice, another never": one_piece_twice,
    "piece of a file that is not there": piece(0, 99),
    "piece of a file before the first": piece(0, -1),
    "piece behind the end of its file": piece(1, 1 << 40),
    "piece at a negative place": piece(1, -8),
    "piece from its end to its beginning": piece(2, 1 << 20),
    "piece longer than its box": piece(3, 1 << 40),
    "box outside its tensor": piece(4, [[0, 1 << 40]]),
    "box of more dims": piece(4, [[0, 1]] * 9),
    "box is text": piece(4, "abc"),
}
"""Lies in a manifest that has the right hash."""


def no_object(text: str, step: Path) -> None:
    (step / MANIFEST).write_text(text)


def name_twice(step: Path) -> None:
    path = step / MANIFEST
    path.write_text(path.read_text().replace('"step": ', '"step": 1, "step": ', 1))


FORGED: dict[str, tuple[Work, str]] = {
    **{f"forged: {name}": (partial(forge, change), "") for name, change in CHANGES.items()},
    **{
        f"manifest: {text[:12]}": (partial(no_object, text), "manifest")
        for text in ("[]", "null", '{"a": 1, "a": 2}', "[" * 100_000, "{" + "1" * 9999, "NaN")
    },
    "manifest: a name twice": (name_twice, "a name stands twice"),
}
"""By name: what does it, and a word of the sentence that tells of it."""
