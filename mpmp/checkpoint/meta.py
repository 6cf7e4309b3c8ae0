"""What a checkpoint's ``meta`` says beside tensors; types are checked once, where it is read.

A manifest with the right hash may still have been written by a bug. What is known has the type
that it is declared with, where it is there at all, and what counts or lasts is not negative; other
entries may be anything.
"""

from __future__ import annotations

import types
from dataclasses import dataclass, is_dataclass
from math import isfinite
from typing import Any, Literal, NewType, Union, get_args, get_origin, get_type_hints

from mpmp.config import Config

Count = NewType("Count", int)
Amount = NewType("Amount", float)
"""Neither is negative."""


@dataclass(frozen=True)
class Optimizer:
    updates: Count


@dataclass(frozen=True)
class Scale:
    """Of :class:`mpmp.optim.scale.LossScale`; empty where there is none."""

    value: Amount
    good: Amount


@dataclass(frozen=True)
class Meta:
    """The entries that are read again."""

    config: Config
    tags: list[str] | None
    optimizer: Optimizer
    scale: Scale
    cut: str
    elapsed_s: Amount
    text_sha256: str | None


def require_types(name: str, said: Any, hint: Any) -> None:
    """Raise ValueError where an entry is of another type than it is declared with."""
    if is_dataclass(hint) and isinstance(said, dict):
        for entry, one in get_type_hints(hint).items():
            if entry in said:
                require_types(f"{name}.{entry}", said[entry], one)
    elif not _fits(said, hint):
        raise ValueError(f"{name} is {said!r:.50}")


def _fits(said: Any, hint: Any) -> bool:
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(said, one) for one in inner)
    if origin is Literal:  # which words there are is for those who use them to say
        return any(type(said) is type(one) for one in inner)
    if origin is list:
        return isinstance(said, list) and all(_fits(one, inner[0]) for one in said)
    if hint in (Count, Amount):
        return _fits(said, hint.__supertype__) and said >= 0
    if hint is float:
        return (type(said) is float and isfinite(said)) or _fits(said, int)
    if hint is int:
        return type(said) is int and abs(said) < 1 << 62
    return type(said) is hint
