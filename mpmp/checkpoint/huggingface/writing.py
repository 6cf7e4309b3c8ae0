"""A folder that transformers loads, written by one process, one file in memory at a time.

config.json   model.safetensors, or model-00001-of-00002.safetensors .. and their index
tokenizer.json and what else lies beside the weights
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from mpmp.checkpoint.alone import ALONE
from mpmp.checkpoint.chosen import choose
from mpmp.checkpoint.contents import Contents
from mpmp.checkpoint.dealing import read
from mpmp.checkpoint.exporting import write_tensors
from mpmp.checkpoint.folder import sync_folder
from mpmp.checkpoint.held import Held
from mpmp.checkpoint.huggingface.byte_tokenizer import (
    is_of_bytes,
    tokenizer_config_json,
    tokenizer_json,
)
from mpmp.checkpoint.huggingface.files import (
    CONFIG,
    INDEX,
    TOKENIZER,
    copy_tokenizer,
    special_tokens,
    survey,
    write_json,
)
from mpmp.checkpoint.huggingface.settings import config_json, family_of
from mpmp.checkpoint.huggingface.tensors import Part, as_ours, parts
from mpmp.checkpoint.loading import read_step, tensor_files
from mpmp.checkpoint.merged import Described, described_by
from mpmp.errors import CheckpointError, ConfigError

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Source:
    """A model of ours in files; ``prefix`` stands before its tensors' names."""

    described: Described
    contents: Contents
    prefix: str
    folder: Path
    """Where the tokenizer lies."""
    step: Path | None
    """The folder of the step that it is; of a merged file none."""

    @property
    def tensors(self) -> dict[str, tuple[Shape, torch.dtype]]:
        """Shape and dtype by our names."""
        return {
            key.removeprefix(self.prefix): (one.shape, one.dtype)
            for key, one in sorted(self.contents.tensors.items())
            if key.startswith(self.prefix)
        }

    def fill(self, held: Sequence[Held]) -> None:
        """Fill tensors, or raise what says whose damage it is."""
        if self.step is None:
            read(self.contents, held, ALONE)
        else:
            read_step(self.step, self.contents, held, ALONE)


def export_folder(source: str, target: str, shard_bytes: int) -> list[Path]:
    """Write the model of a run, a step or a merged file as a folder; the files that were written.

    No file has more than ``shard_bytes`` of tensors, but where one tensor has. The folder appears
    when it is whole. Raises ConfigError for a model that transformers does not have.
    """
    place = Path(os.path.abspath(target))
    if os.path.lexists(place) and (place == Path.cwd() or not _is_empty(place)):
        raise ConfigError(f"{target} is there already; name a new folder by --to")
    found = _source(source)
    with _appearing(place) as unfinished:
        names = _write(found, unfinished, shard_bytes)
    return [place / name for name in names]


@contextmanager
def _appearing(place: Path) -> Iterator[Path]:
    """A folder to write in, which takes its place when it is whole, also that of an empty one."""
    place.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(".tmp", f"{place.name}.", place.parent))
    try:
        yield unfinished
        unfinished.chmod(0o755)  # a temporary folder is its maker's alone
        os.rename(unfinished, place)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    sync_folder(place.parent)


def _is_empty(place: Path) -> bool:
    return place.is_dir() and not place.is_symlink() and not any(place.iterdir())


def _source(source: str) -> Source:
    path = Path(source)
    if path.is_file():
        seen = survey(source)
        described = seen.described
        if described is None:
            raise CheckpointError(
                f"{source} does not say what model it holds; export the checkpoint that it comes of"
            )
        contents = tensor_files([Path(one) for one in seen.paths], ALONE)
        return Source(described, contents, "", path.parent, None)
    chosen = choose(source)
    step, manifest = chosen.newest()
    meta = manifest.meta
    described = described_by(meta.get("config", {}), meta.get("tags"), str(step))
    return Source(described, manifest.contents(step), "weight/", chosen.run, step)


def _write(source: Source, folder: Path, shard_bytes: int) -> list[str]:
    model, tensors = source.described.model, source.tensors
    family = family_of(model)
    places = {name: parts(family, name, shape) for name, (shape, _) in tensors.items()}
    strange = [name for name, found in places.items() if found is None]
    if strange:
        raise CheckpointError(
            f"{model.weights} has {strange[0]}, which {family.model_type} has no name for"
        )
    known = {name: found for name, found in places.items() if found is not None}
    theirs = {
        part.name: (part.shape, tensors[name][1]) for name, found in known.items() for part in found
    }
    (vocabulary, _), dtype = tensors["embedding.weight"]
    files = list(_shards(theirs, shard_bytes))
    weight_map = {name: file for file, names in _named(files) for name in names}
    for file, names in _named(files):
        _write_file(source, known, {name: theirs[name] for name in names}, folder / file)
    if len(files) > 1:
        total = sum(_bytes(*one) for one in theirs.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(folder / INDEX, index)
    _write_tokenizer(source, folder, vocabulary)
    said = config_json(
        model,
        vocabulary,
        source.described.tags,
        str(dtype).removeprefix("torch."),
        special_tokens(folder),
    )
    write_json(folder / CONFIG, said)
    return sorted(one.name for one in folder.iterdir())


def _write_tokenizer(source: Source, folder: Path, vocabulary: int) -> None:
    """The one beside the weights; that of bytes where the model was made without a file."""
    model, masked = source.described.model, source.described.model.kind == "bert"
    names = copy_tokenizer(source.folder, folder)
    if TOKENIZER not in names and is_of_bytes(vocabulary, masked):
        write_json(folder / TOKENIZER, tokenizer_json(masked))
        write_json(folder / "tokenizer_config.json", tokenizer_config_json(model.context, masked))


def _shards(theirs: Mapping[str, tuple[Shape, torch.dtype]], limit: int) -> Iterator[list[str]]:
    """Tensors in turn, as many as a file may have."""
    names: list[str] = []
    size = 0
    for name, one in theirs.items():
        if names and size + _bytes(*one) > limit:
            yield names
            names, size = [], 0
        names.append(name)
        size += _bytes(*one)
    yield names


def _named(files: list[list[str]]) -> list[tuple[str, list[str]]]:
    if len(files) == 1:
        return [("model.safetensors", files[0])]
    count = len(files)
    return [
        (f"model-{number:05}-of-{count:05}.safetensors", names)
        for number, names in enumerate(files, 1)
    ]


def _write_file(
    source: Source,
    places: Mapping[str, list[Part]],
    theirs: Mapping[str, tuple[Shape, torch.dtype]],
    path: Path,
) -> None:
    tensors = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in theirs.items()}
    held = [
        one
        for name, found in places.items()
        for one in as_ours(source.prefix + name, source.tensors[name][0], found, tensors)
    ]
    source.fill(held)
    write_tensors(path, tensors, {})


def _bytes(shape: Shape, dtype: torch.dtype) -> int:
    return prod(shape) * dtype.itemsize
