"""CoNLL files: a word and its tag on a line, a blank line between two sentences.

    Empire    B-location      Columns stand between tabs, or between blanks; the word is the first,
    State     I-location      the tag the last. B- begins an entity, I- goes on with it, O is
    Building  I-location      outside: IOB2 (Tjong Kim Sang and Veenstra 1999). In IOB1 B- parts
    =         O               two neighbours of one kind only; such a file is converted.

Lines that begin with -DOCSTART- end a sentence and are skipped. Every mistake is an
InputOutputError that begins with FILE:LINE.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mpmp.errors import InputOutputError

OUTSIDE = "O"
SPLITS = ("train", "validation", "test")
_BLANK = " \t\r"
_TAG = re.compile(r"O|[BI]-\S(.*\S)?")
_WORDS = {
    "train": {"train", "training"},
    "validation": {"dev", "devel", "valid", "validation", "val", "testa"},
    "test": {"test", "testb"},
}
_ENDINGS = {"conll", "conll2003", "txt", "tsv", "iob", "iob2", "bio"}


@dataclass(frozen=True)
class Sentence:
    """Words and their tags, and the line of the first word."""

    words: tuple[str, ...]
    tags: tuple[str, ...]
    line: int


@dataclass(frozen=True)
class Tagged:
    """The sentences of a file, in IOB2."""

    path: str
    sentences: tuple[Sentence, ...]
    converted: bool = False
    """Whether the file was IOB1."""

    @property
    def num_words(self) -> int:
        return sum(len(one.words) for one in self.sentences)


def find(folder: str) -> dict[str, str]:
    """The files of a folder by their split; a test split may be missing.

    A file's split is told by a part of its name, as in train.conll, eng.testa or wnut-dev.iob2.
    """
    found: dict[str, str] = {}
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise InputOutputError(f"{folder!r} cannot be read ({error.strerror})") from None
    for name in names:
        parts = re.split(r"[._-]+", name.lower())
        splits = [split for split in SPLITS if _WORDS[split] & set(parts)]
        if len(splits) != 1 or not (parts[-1] in _ENDINGS or parts[-1] in _WORDS[splits[0]]):
            continue
        path = os.path.join(folder, name)
        if splits[0] in found:
            raise InputOutputError(
                f"{found[splits[0]]} and {path} both look like the {splits[0]} split; leave one "
                "there, or name files by --data.path, --data.validation and --data.test"
            )
        found[splits[0]] = path
    for split in ("train", "validation"):
        if split not in found:
            raise InputOutputError(
                f"{folder!r} has no file of the {split} split: none with "
                f"{' or '.join(sorted(_WORDS[split]))} in its name, as {split}.conll; or name "
                "files by --data.path, --data.validation and --data.test"
            )
    return {split: found[split] for split in SPLITS if split in found}


def read(path: str) -> Tagged:
    """The sentences of a file of UTF-8."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise InputOutputError(f"{path!r} cannot be read ({error.strerror})") from None
    try:
        return parse(data.decode("utf-8-sig"), path)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputOutputError(
            f"{path}:{line}: no UTF-8 text ({error.reason}); convert the file, for instance with "
            "iconv"
        ) from None


def parse(text: str, path: str) -> Tagged:
    """The sentences of a file's text."""
    sentences = tuple(_sentences(text, path))
    if not sentences:
        raise InputOutputError(f"{path}:1: there is no sentence; give a file of words and tags")
    return _understood(Tagged(path, sentences))


def kinds(sentences: Iterable[Sentence]) -> list[str]:
    """The kinds of entities, in the order of the alphabet."""
    return sorted({tag[2:] for one in sentences for tag in one.tags if tag != OUTSIDE})


def in_iob2(tags: Sequence[str]) -> tuple[str, ...]:
    """The same entities with B- at the beginning of each, where I- may have begun some."""
    pairs = zip((OUTSIDE, *tags), tags, strict=False)
    return tuple(
        f"B{tag[1:]}" if tag[0] == "I" and tag[1:] != before[1:] else tag for before, tag in pairs
    )


def write(path: Path, sentences: Iterable[Sentence], predicted: Iterable[Iterable[str]]) -> None:
    """Word, tag and predicted tag of each word, between tabs."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for one, tags in zip(sentences, predicted, strict=True):
            rows = zip(one.words, one.tags, tags, strict=True)
            file.writelines("\t".join(row) + "\n" for row in rows)
            file.write("\n")


# --- lines ----------------------------------------------------------------------------------------


def _sentences(text: str, path: str) -> Iterator[Sentence]:
    words: list[str] = []
    tags: list[str] = []
    separator, columns, first = "", 0, 0
    number = 0
    # Not splitlines, which also parts lines at characters that stand in words.
    for number, raw in enumerate(text.split("\n"), 1):
        line = raw.strip(_BLANK)
        if not line or line.startswith("-DOCSTART-"):
            if words:
                yield Sentence(tuple(words), tuple(tags), number - len(words))
            words, tags = [], []
            continue
        if not columns:
            separator = "\t" if "\t" in line else " "
        cells = raw.rstrip("\r").split("\t") if separator == "\t" else re.split("[ \t]+", line)
        cells = [cell.strip(_BLANK) for cell in cells]
        if not columns:
            columns, first = len(cells), number
        _require_columns(path, number, cells, columns, first)
        words.append(cells[0])
        tags.append(cells[-1])
    if words:
        yield Sentence(tuple(words), tuple(tags), number - len(words) + 1)


def _require_columns(path: str, line: int, cells: list[str], columns: int, first: int) -> None:
    """See that a line has a word, a tag and as many columns as the first line has."""
    problem = ""
    if len(cells) == 1:
        problem = f"{cells[0][:40]!r} is one column; a line is a word, and behind it its tag"
    elif len(cells) != columns:
        problem = f"{len(cells)} columns, where line {first} has {columns}"
    elif not cells[0]:
        problem = "the first column has no word"
    elif not _TAG.fullmatch(cells[-1]):
        problem = f"the last column is {cells[-1][:40]!r}, and a tag is O, B-KIND or I-KIND (IOB2)"
    if problem:
        raise InputOutputError(f"{path}:{line}: {problem}")


# --- schemes --------------------------------------------------------------------------------------


def _understood(tagged: Tagged) -> Tagged:
    """The same in IOB2; what is neither IOB2 nor IOB1 is refused."""
    by_i: list[tuple[int, str, str]] = []  # entities that I- begins: not IOB2
    by_b = 0  # the first line where B- begins one that has no such neighbour: not IOB1
    for one in tagged.sentences:
        before = OUTSIDE
        for place, tag in enumerate(one.tags):
            neighbours = tag[1:] == before[1:]
            if tag[0] == "I" and not neighbours:
                by_i.append((one.line + place, tag, before))
            elif tag[0] == "B" and not neighbours:
                by_b = by_b or one.line + place
            before = tag
    if not by_i:
        return tagged
    if by_b:
        line, tag, before = by_i[0]
        raise InputOutputError(
            f"{tagged.path}:{line}: {tag} follows {before}, but in IOB2 B{tag[1:]} begins an "
            f"entity, and IOB1 would not have the B- of line {by_b}; mend the tags"
        )
    sentences = tuple(replace(one, tags=in_iob2(one.tags)) for one in tagged.sentences)
    return Tagged(tagged.path, sentences, converted=True)
