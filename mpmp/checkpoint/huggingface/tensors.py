"""Where each of our tensors lies in theirs.

    ours  attention.qkv (3, D, D), blocks of (out, in)       q          k          v
    GPT-2 c_attn.weight (D, 3 D), (in, 3 out)             [:, :D].T [:, D:2D].T [:, 2D:].T
    LLaMA, BERT                                            q_proj     k_proj     v_proj

A block is a matrix or a vector, and lies in one tensor of theirs; it may be turned there. So a box
of ours is a box of theirs, and is read into a view of our memory without a copy in between.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from mpmp.checkpoint.extents import Box, lengths, volume, windows
from mpmp.checkpoint.held import Held
from mpmp.checkpoint.huggingface.family import Family

_BLOCK = re.compile(r"blocks\.([0-9]+)\.")


@dataclass(frozen=True)
class Part:
    """A block of ours in a tensor of theirs, which has ``shape``."""

    name: str
    shape: tuple[int, ...]
    start: int
    """The block's first output in the tensor."""
    turned: bool
    """The tensor is (in, out)."""

    def box(self, own: Box) -> Box:
        """Where a box of the block lies in the tensor."""
        (low, high), *rest = own
        moved = ((self.start + low, self.start + high), *rest)
        return moved[::-1] if self.turned else moved

    def view(self, tensor: Tensor) -> Tensor:
        """A tensor of ours as theirs has it, or the other way round."""
        return tensor.t() if self.turned else tensor


def parts(family: Family, name: str, shape: tuple[int, ...]) -> list[Part] | None:
    """The blocks of our tensor of that name and global shape; None where the family has none."""
    number = _BLOCK.match(name)
    pattern = _BLOCK.sub("blocks.#.", name)
    stem, _, kind = pattern.rpartition(".")
    if pattern in family.tensors:
        stems, ending = family.tensors[pattern], ""
    else:
        stems, ending = family.tensors.get(stem, ()), f".{kind}"
    if not stems:
        return None
    block = shape[1:] if len(stems) > 1 else shape
    found = []
    for index, one in enumerate(stems):
        before, beside = stems[:index].count(one), stems.count(one)
        turned = len(block) == 2 and one.endswith(family.turned or ("\0",))
        whole = (beside * block[0], *block[1:])
        theirs = one.replace("#", number[1]) if number else one
        found.append(
            Part(theirs + ending, whole[::-1] if turned else whole, before * block[0], turned)
        )
    return found


def as_theirs(held: Held, found: list[Part]) -> Iterator[Held]:
    """What a rank holds of a tensor of ours, as boxes of theirs over the same memory."""
    for at, box in windows(held.extent):
        memory = held.tensor
        if memory.shape != lengths(box):
            memory = memory.view(-1)[at : at + volume(box)].view(lengths(box))
        if len(found) == 1:
            yield _held(found[0], box, memory)
            continue
        (first, last), *inner = box
        for block in range(first, last):
            yield _held(found[block], tuple(inner), memory[block - first])


def _held(part: Part, box: Box, memory: Tensor) -> Held:
    return Held(part.name, part.shape, part.box(box), part.view(memory))


def as_ours(
    key: str, shape: tuple[int, ...], found: list[Part], theirs: Mapping[str, Tensor]
) -> Iterator[Held]:
    """The blocks of a tensor of ours that lie in some of theirs, as boxes over their memory."""
    block = shape[1:] if len(found) > 1 else shape
    for number, part in enumerate(found):
        if part.name not in theirs:
            continue
        box = tuple((0, length) for length in block)
        place = tuple(slice(low, high) for low, high in part.box(box))
        memory = part.view(theirs[part.name][place])
        if len(found) == 1:
            yield Held(key, shape, box, memory)
        else:
            yield Held(key, shape, ((number, number + 1), *box), memory.unsqueeze(0))
