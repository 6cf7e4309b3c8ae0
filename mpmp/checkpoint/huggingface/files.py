"""The files of a Hugging Face folder or a merged model: all but the tensors."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from mpmp.checkpoint import merged, tensorfile
from mpmp.checkpoint.huggingface.settings import understood
from mpmp.checkpoint.merged import Described
from mpmp.errors import CheckpointError, InputOutputError

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
GENERATION = "generation_config.json"
_BESIDE = (
    TOKENIZER,
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    GENERATION,
)
_LONGEST_BYTES = 64 << 20


@dataclass(frozen=True)
class Survey:
    """What rank 0 sees of a model's files, in JSON's types, for all ranks to know the same."""

    where: str
    said: dict[str, Any]
    """config.json, or the metadata of a merged file."""
    names: list[str]
    paths: list[str]
    weight_map: dict[str, str] | None = None
    """The name of the file that a tensor is in, where there is an index."""
    tokenizer: str | None = None

    @property
    def described(self) -> Described | None:
        """What the files say of the model; as :func:`describe`."""
        merged_one = Path(self.where).suffix == ".safetensors"
        read = merged.described if merged_one else understood
        found = read(self.said, self.where)
        return None if found is None else replace(found, tokenizer=self.tokenizer)


def describe(path: str) -> Described | None:
    """The model in a Hugging Face folder or a merged file; None where a file does not say.

    Raises CheckpointError where files are missing or damaged, ConfigError where mpmp has no such
    model.
    """
    return survey(path).described


def survey(path: str) -> Survey:
    """What lies at a path, with no tensor read; CheckpointError where it is not whole."""
    place = Path(path)
    if place.is_file() and place.suffix == ".safetensors":
        said, folder = _header(place), place.parent
        names, weight_map = [place.name], None
    elif place.is_dir():
        folder = place
        names, weight_map = _weights(place)
        said = _read(place / CONFIG)
    else:
        raise InputOutputError(
            f"{path!r} is neither a folder nor a .safetensors file; give a Hugging Face folder or "
            "a merged model.safetensors"
        )
    # Of a download the files are links into a store that the user's own tool keeps.
    paths = [str((folder / name).resolve()) for name in names]
    tokenizer = folder / TOKENIZER
    return Survey(
        path, said, names, paths, weight_map, str(tokenizer) if tokenizer.is_file() else None
    )


def copy_tokenizer(source: Path, target: Path) -> list[str]:
    """Copy the tokenizer and what belongs to it, as far as it is there; the names that were."""
    names = [name for name in _BESIDE if (source / name).is_file()]
    for name in names:
        if (source / name).resolve() != (target / name).resolve():
            shutil.copyfile(source / name, target / name)
    return names


def special_tokens(folder: Path) -> dict[str, int]:
    """Numbers of the tokens that begin a text, end it and fill it up, as the tokenizer has them."""
    added = _read_if_there(folder / TOKENIZER).get("added_tokens")
    entries = [one for one in added if isinstance(one, dict)] if isinstance(added, list) else []
    pairs = [(one.get("content"), one.get("id")) for one in entries]
    numbers = {name: one for name, one in pairs if isinstance(name, str) and type(one) is int}
    said = _read_if_there(folder / TOKENIZER_CONFIG)
    known = {"eos": ("<|endoftext|>", "</s>", "[SEP]"), "bos": ("<s>",), "pad": ("[PAD]", "<pad>")}
    found = {}
    for kind, usual in known.items():
        token = said.get(f"{kind}_token")
        own = token.get("content") if isinstance(token, dict) else token
        name = own or next((one for one in usual if one in numbers), None)
        if isinstance(name, str) and name in numbers:
            found[f"{kind}_token_id"] = numbers[name]
    return found


def ends_of_text(folder: Path) -> list[int]:
    """Numbers of the tokens that end a text, by any file of a folder that says so."""
    told = [
        special_tokens(folder),
        *(_read_if_there(folder / name) for name in (CONFIG, GENERATION)),
    ]
    values = [said.get("eos_token_id") for said in told]
    numbers = [number for one in values for number in (one if isinstance(one, list) else [one])]
    return sorted({number for number in numbers if type(number) is int})


# --- inside ---------------------------------------------------------------------------------------


def _weights(folder: Path) -> tuple[list[str], dict[str, str] | None]:
    """Names of the files with tensors, and the index where there are several."""
    if (folder / WEIGHTS).exists():
        return [WEIGHTS], None
    if not (folder / INDEX).exists():
        raise CheckpointError(f"{folder} {_why_without_weights(folder)}")
    weight_map = _read(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{folder} has an {INDEX} without a weight_map of tensors")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or name != os.path.basename(name) or name in ("", ".", ".."):
            raise CheckpointError(
                f"{folder} has an {INDEX} that says {tensor!r:.100} lies in {name!r:.100}, which "
                "is no name of a file in the folder"
            )
    names = sorted(set(weight_map.values()))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{folder} lacks the shard {missing[0]}, which its {INDEX} names ({len(missing)} of "
            f"{len(names)} shards are missing); copy the whole folder"
        )
    return names, weight_map


def _why_without_weights(folder: Path) -> str:
    pickles = sorted(
        name.name for name in folder.iterdir() if name.suffix in (".bin", ".pt", ".pth")
    )
    if pickles:
        return (
            f"has its weights in {pickles[0]}, a pickle, which may run any code when it is read; "
            "write the folder again with transformers' save_pretrained, as safetensors"
        )
    if any(one.name.startswith("step_") for one in folder.iterdir()):
        return (
            f"is the folder of a run and not Hugging Face's; give {folder / WEIGHTS}, or export "
            f"it: python -m mpmp.checkpoint export {folder} --to FOLDER"
        )
    return f"has neither {WEIGHTS} nor {INDEX}, so there are no weights"


def _read(path: Path) -> dict[str, Any]:
    with _opened(path) as file:
        text = file.read(_LONGEST_BYTES + 1)
    if len(text) > _LONGEST_BYTES:
        raise CheckpointError(
            f"{path.parent} has a {path.name} of more than {_LONGEST_BYTES} bytes"
        )
    try:
        return tensorfile.parse_object(text, path.name)
    except CheckpointError as error:
        raise CheckpointError(f"{path.parent} {error}") from None


def _read_if_there(path: Path) -> dict[str, Any]:
    return _read(path) if path.is_file() else {}


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """A file to read; CheckpointError where there is none, InputOutputError where it fails."""
    try:
        with open(path, "rb") as file:
            yield file
    except FileNotFoundError:
        raise CheckpointError(
            f"{path.parent} has no {path.name}, which would say what model it holds"
        ) from None
    except OSError as error:
        raise InputOutputError(f"{path} cannot be read: {error.strerror}") from None


def _header(path: Path) -> dict[str, Any]:
    """What the header of a merged file says: its metadata, and the rows of the embedding."""
    with _opened(path) as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length) if length <= _LONGEST_BYTES else b""
    if len(header) != length or not header:
        raise CheckpointError(f"{path} is no safetensors file: its header is longer than it is")
    try:
        said = tensorfile.parse_object(header, "header")
    except CheckpointError as error:
        raise CheckpointError(f"{path} {error}") from None
    try:
        rows = said["embedding.weight"]["shape"][0]
        return {**said.get("__metadata__", {}), merged.ROWS: int(rows)}
    except (KeyError, TypeError, ValueError, IndexError, OverflowError):
        raise CheckpointError(f"{path} has no embedding, so it is no model of mpmp") from None


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """A file of JSON for people to read, too."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
