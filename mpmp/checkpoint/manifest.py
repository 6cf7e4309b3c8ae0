"""The manifest: what a checkpoint consists of, written last, so that where it is all else is.

    {"format": 1, "step": 12, "serial": 3, "layout": "dp2.pp1.tp2", "mpmp": "0.1.0",
     "meta": {..}, "shards": {"shard_pp000_tp000.safetensors": {size, block hashes}, ..},
     "sha256": hash of all the rest}

``serial`` counts the saves of a run folder: newest means saved last, also where a run was begun
anew in the folder of one that had come further.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any

from mpmp import __version__
from mpmp.checkpoint.blocks import Fingerprint
from mpmp.checkpoint.tensorfile import parse_object
from mpmp.config import AXES, parse_layout
from mpmp.errors import CheckpointError, ConfigError

FORMAT = 1
FILE = "manifest.json"
LONGEST_BYTES = 1 << 28
"""Room for the hashes of 3 TB; a longer manifest is taken for damage."""


class NewerFormatError(CheckpointError):
    """A sound checkpoint of a later version of mpmp; no reason to fall back to an older step."""


@dataclass(frozen=True)
class Manifest:
    """One checkpoint: its place in the run, its shards by file name, the caller's ``meta``."""

    step: int
    serial: int
    layout: str
    shards: Mapping[str, Fingerprint]
    meta: Mapping[str, Any]

    def to_text(self) -> str:
        content = {
            "format": FORMAT,
            "mpmp": __version__,
            "step": self.step,
            "serial": self.serial,
            "layout": self.layout,
            "shards": {name: describe(one) for name, one in self.shards.items()},
            "meta": self.meta,
        }
        return _canonical({**content, "sha256": _digest(content)})


def parse(text: str) -> Manifest:
    """The manifest a text holds; raises CheckpointError for any but the text that was written."""
    content = parse_object(text.encode(), "manifest")
    digest = content.pop("sha256", None)
    # Equal to the canonical text: no byte can change, not even one that means nothing.
    if digest != _digest(content) or text != _canonical({**content, "sha256": digest}):
        raise CheckpointError("has a damaged manifest: its SHA-256 is not the one saved")
    version = content.get("format")
    if type(version) is not int or version < 1:
        raise CheckpointError(f"has a manifest of format {version!r}")
    if version > FORMAT:
        raise NewerFormatError(
            f"was saved by mpmp {content.get('mpmp')!r} in format {version}, and this mpmp "
            f"({__version__}) reads up to {FORMAT}; update it or choose another --checkpoint.dir"
        )
    try:
        meta, shards = content["meta"], content["shards"]
        step, serial = _length(content["step"]), _length(content["serial"])
        layout = content["layout"]
        expected = set(shard_names(parse_layout(layout)))
        if not isinstance(meta, dict) or set(shards) != expected:
            raise ValueError(f"layout {layout} has the shards {sorted(expected)}")
        fingerprints = {name: fingerprint(one) for name, one in shards.items()}
    except (KeyError, TypeError, ValueError, AttributeError, ConfigError) as error:
        raise CheckpointError(f"has a manifest that makes no sense ({error!r:.200})") from None
    return Manifest(step, serial, layout, fingerprints, meta)


_SHORT = {"data": "dp", "expert": "ep", "pipeline": "pp", "context": "cp", "tensor": "tp"}


def written_axes(layout: Mapping[str, Any]) -> tuple[str, ...]:
    """Axes of the mesh along which ranks hold different states; of the others the first writes."""
    axes = ("data", "expert", "context") if layout["zero"] else ("expert",)
    different = {axis for axis in axes if layout[axis] > 1} | {"pipeline", "tensor"}
    return tuple(axis for axis in AXES if axis in different)


def shard_name(index: Mapping[str, int], layout: Mapping[str, Any]) -> str:
    """File of the rank at ``index`` on the mesh."""
    places = (f"{_SHORT[axis]}{index[axis]:03}" for axis in written_axes(layout))
    return f"shard_{'_'.join(places)}.safetensors"


def shard_names(layout: Mapping[str, Any]) -> list[str]:
    """Files of a layout: one for each place on the axes that are written."""
    sizes = {**layout, "data": layout["data"] // layout["expert"]}
    axes = written_axes(layout)
    if prod(sizes[axis] for axis in axes) > 1 << 20:  # a forged layout must not fill the memory
        raise ValueError(f"{layout} is no layout")
    places = product(*(range(sizes[axis]) for axis in axes))
    return [shard_name(dict(zip(axes, place, strict=True)), layout) for place in places]


def describe(one: Fingerprint) -> dict[str, Any]:
    """A fingerprint in JSON's types."""
    return {
        "bytes": one.size_bytes,
        "block_bytes": one.block_bytes,
        "sha256": list(one.blocks),
    }


def fingerprint(said: dict[str, Any]) -> Fingerprint:
    """What :func:`describe` made; KeyError, TypeError or ValueError for anything else."""
    size, block_bytes, blocks = _length(said["bytes"]), _length(said["block_bytes"]), said["sha256"]
    if not 1 << 10 <= block_bytes <= 1 << 30 or not isinstance(blocks, list):
        raise ValueError(f"blocks of {block_bytes} bytes")
    if len(blocks) != -(-size // block_bytes) or not all(isinstance(one, str) for one in blocks):
        raise ValueError(f"{len(blocks)} blocks of {block_bytes} bytes in a file of {size}")
    return Fingerprint(size, block_bytes, tuple(blocks))


def _length(said: Any) -> int:
    if type(said) is not int or not 0 <= said < 1 << 62:
        raise ValueError(f"{said!r:.50} is no length")
    return said


def _canonical(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=1, sort_keys=True) + "\n"


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(_canonical(content).encode()).hexdigest()
