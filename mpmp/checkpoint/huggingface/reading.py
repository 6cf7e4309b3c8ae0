"""Weights out of a Hugging Face folder, or a merged file, into any layout.

rank 0      config.json, index, headers -> told to all
all ranks   names and shapes of the whole model -> each tensor of the folder has its place, or not
all ranks   each byte that is needed is read by one rank and dealt out
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from mpmp.checkpoint.contents import Contents, Stored
from mpmp.checkpoint.dealing import read
from mpmp.checkpoint.held import Held
from mpmp.checkpoint.huggingface.family import Family
from mpmp.checkpoint.huggingface.files import Survey, survey
from mpmp.checkpoint.huggingface.settings import family_of, refuse_contradiction
from mpmp.checkpoint.huggingface.tensors import Part, as_theirs, parts
from mpmp.checkpoint.loading import tensor_files
from mpmp.checkpoint.merged import Described
from mpmp.comm.agreement import exchange, on_first
from mpmp.config import Model
from mpmp.errors import CheckpointError

if TYPE_CHECKING:
    from mpmp.comm.mesh import Mesh

Shape = tuple[int, ...]
_WEIGHT = "weight/"
_AT_ONCE_BYTES = 256 << 20


def load_folder(path: str, wants: Sequence[Held], mesh: Mesh, model: Model) -> tuple[str, ...]:
    """Fill what each rank wants of a model's weights, all ranks together; sentences for the user.

    ``wants`` have the keys of a checkpoint ("weight/.."), and ``model`` is what they are part of.
    Raises on every rank alike CheckpointError (files that are damaged, or do not hold the model),
    ConfigError (settings that contradict the folder's).
    """
    seen = Survey(**on_first(f"read {path}", lambda: asdict(survey(path)), mesh))
    described = seen.described
    contents = tensor_files([Path(one) for one in seen.paths], mesh)
    _see_index(seen, contents)
    if described is not None:
        refuse_contradiction(model, described)
    ours: dict[str, Shape] = {}
    own = [(one.key.removeprefix(_WEIGHT), one.shape) for one in wants]
    for text in exchange(json.dumps(own), mesh):
        ours |= {name: tuple(shape) for name, shape in json.loads(text)}
    places, notes = _matched(path, described, ours, contents.tensors)
    theirs = [
        part
        for one in wants
        if (name := one.key.removeprefix(_WEIGHT)) in places
        for part in as_theirs(one, places[name])
    ]
    for names in _turns(contents, {part.name for one in places.values() for part in one}):
        read(contents, [one for one in theirs if one.key in names], mesh)
    return (described.notes if described is not None else ()) + notes


def _turns(contents: Contents, wanted: set[str]) -> Iterator[set[str]]:
    """Tensors that are read at once: turned or of another type, they take memory of their own."""
    names: set[str] = set()
    size = 0
    for name in sorted(wanted, key=lambda name: _place(contents, name)):
        names.add(name)
        size += prod(contents.tensors[name].shape) * contents.tensors[name].dtype.itemsize
        if size >= _AT_ONCE_BYTES:
            yield names
            names, size = set(), 0
    yield names


def _place(contents: Contents, name: str) -> tuple[int, int]:
    first = contents.tensors[name].pieces[0]
    return first.file, first.offset


def _see_index(seen: Survey, contents: Contents) -> None:
    """CheckpointError where the files do not hold the tensors that their index tells of."""
    if seen.weight_map is None:
        return
    files = {name: seen.names[one.pieces[0].file] for name, one in contents.tensors.items()}
    for tensor, name in sorted(seen.weight_map.items()):
        if files.get(tensor) != name:
            lies = f"lies in {files[tensor]}" if tensor in files else "is in none of the files"
            raise CheckpointError(
                f"{seen.where} has an index by which {tensor} lies in {name}, but it {lies}"
            )
    beyond = sorted(set(files) - set(seen.weight_map))
    if beyond:
        raise CheckpointError(f"{seen.where} has {_few(beyond)}, which its index does not name")


def _matched(
    path: str,
    described: Described | None,
    ours: Mapping[str, Shape],
    stored: Mapping[str, Stored],
) -> tuple[dict[str, list[Part]], tuple[str, ...]]:
    """Where in the files our tensors lie, and sentences of what is left out on either side."""
    family = None
    if described is not None and described.theirs:
        family = family_of(described.model)
    names = {_canonical(family, name): name for name in stored}
    places: dict[str, list[Part]] = {}
    fresh, missing = [], []
    for name, shape in sorted(ours.items()):
        wanted = [Part(name, shape, 0, False)] if family is None else parts(family, name, shape)
        assert wanted is not None, f"a model that was made of settings has no other tensors: {name}"
        if all(part.name in names for part in wanted):
            places[name] = [_seen(path, name, part, names, stored) for part in wanted]
        elif described is not None and _of_other_head(name, described):
            fresh.append(name)
        else:
            missing += [part.name for part in wanted if part.name not in names]
    if missing:
        raise CheckpointError(f"{path} lacks {_few(sorted(set(missing)))}")
    used = {part.name for one in places.values() for part in one}
    left = _left_out(path, family, names, used, ours)
    notes = [f"not in {path}, so it begins at random: {_few(fresh)}"] if fresh else []
    notes += [f"in {path}, and mpmp leaves it out: {_few(left)}"] if left else []
    return places, tuple(notes)


def _canonical(family: Family | None, name: str) -> str:
    """A tensor's name as transformers writes it today.

    Files of a bare model have no prefix, and old ones have gamma and beta in place of weight and
    bias.
    """
    if family is None:
        return name
    if not name.startswith((family.base, *family.heads)):
        name = family.base + name
    old = {"gamma": "weight", "beta": "bias"}
    return re.sub(r"(?<=LayerNorm\.)(gamma|beta)$", lambda found: old[found[1]], name)


def _seen(
    path: str, name: str, part: Part, names: Mapping[str, str], stored: Mapping[str, Stored]
) -> Part:
    """The part under its name in the files; CheckpointError where it has another shape."""
    real = names[part.name]
    there = stored[real]
    if not there.dtype.is_floating_point:
        raise CheckpointError(f"{path} has {real} of {there.dtype}, not of a floating-point type")
    # The first positions of a table serve shorter sequences.
    longer = name == "position" and there.shape[1:] == part.shape[1:]
    if there.shape != part.shape and not (longer and there.shape[0] > part.shape[0]):
        raise CheckpointError(
            f"{path} has {real} of shape {there.shape} where the model has {part.shape}"
        )
    return replace(part, name=real, shape=there.shape)


def _of_other_head(name: str, described: Described) -> bool:
    """Whether a tensor of ours scores what the files' model does not."""
    if name.startswith("tags."):
        return described.head != "tags"
    return name.startswith("head.") and described.head != "words"


def _left_out(
    path: str,
    family: Family | None,
    names: Mapping[str, str],
    used: set[str],
    ours: Mapping[str, Shape],
) -> list[str]:
    """Tensors of theirs that are learnt and not used; CheckpointError for those that none knows."""
    rest = {name: real for name, real in names.items() if real not in used}
    tied = "output.weight" not in ours
    heads = ("head.", "output.", "tags.") if family is None else family.heads
    left: list[str] = []
    unknown: list[str] = []
    for name, real in sorted(rest.items()):
        if family is not None and re.fullmatch(family.buffers, name):
            continue
        if family is not None and tied and re.fullmatch(family.copies, name):
            continue
        spare = family is not None and re.fullmatch(family.spare, name)
        (left if spare or _is_other_head(name, heads, ours) else unknown).append(real)
    if unknown:
        raise CheckpointError(f"{path} has {_few(unknown)}, which the model has not")
    return left


def _is_other_head(name: str, heads: tuple[str, ...], ours: Mapping[str, Shape]) -> bool:
    """Whether a tensor scores what our model does not: words beside tags, or tags beside words."""
    tagging = "tags.weight" in ours
    of_tags = name.startswith(("classifier.", "tags."))
    return name.startswith(heads) and tagging != of_tags


def _few(names: Sequence[str]) -> str:
    more = len(names) - 3
    return ", ".join(names[:3]) + (f" and {more} more" if more > 0 else "")
