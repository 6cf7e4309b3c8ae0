"""Text, split into training and validation: Python's standard library, or a path of the user's.

The default corpus needs no download: the source of the standard library is real text that lies on
every machine that can run this program. A file or folder of the user's may have any extension.

One file in ten is for validation, chosen by the SHA-256 of its path inside the folder, so that a
file stays on its side whatever is added beside it. Where that leaves a side empty (a single file,
a handful of files) the text is cut by position instead, its last tenth for validation.
"""

from __future__ import annotations

import hashlib
import os
import platform
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mpmp.errors import InputOutputError

_NOT_SOURCE = {"site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True)
class Text:
    """Documents of UTF-8 bytes, none empty, in the order of their paths."""

    name: str
    train: tuple[bytes, ...]
    validation: tuple[bytes, ...]


def read(path: str | None) -> Text:
    """The text at ``path``, or of the standard library where ``path`` is None.

    Raises InputOutputError where there is nothing to read.
    """
    if path is None:
        name = f"standard library of Python {platform.python_version()}"
        return Text(name, *_split(_standard_library()))
    root = os.path.expanduser(path)  # a recipe's "~" has not been through a shell
    if os.path.isdir(root):
        return Text(path, *_split(_folder(root)))
    if os.path.isfile(root):
        return Text(path, *_split({os.path.basename(root): _file(root)}))
    problem = "is neither a file nor a folder" if os.path.exists(root) else "does not exist"
    raise InputOutputError(f"data.path {path!r} {problem}; give a text file or a folder of them")


def _standard_library() -> dict[str, bytes]:
    root = sysconfig.get_path("stdlib")
    documents = {}
    for file in _walk(root, skip=_NOT_SOURCE.__contains__):
        if file.endswith(".py"):
            try:
                documents[file] = Path(root, file).read_bytes()
            except OSError:  # not the user's files, so nothing the user could mend
                continue
    documents = {file: text for file, text in documents.items() if text and _is_utf8(text)}
    if not documents:
        raise InputOutputError(
            f"no source of the standard library was found in {root}; give a text by --data.path"
        )
    return documents


def _folder(root: str) -> dict[str, bytes]:
    files = _walk(root, skip=lambda name: name.startswith("."), on_error=_refuse)
    documents = {file: _bytes_of(os.path.join(root, file)) for file in files}
    documents = {file: text for file, text in documents.items() if text and _is_utf8(text)}
    if not documents:
        raise InputOutputError(
            f"no text was found in the folder {root!r}: empty or hidden files, symbolic links and "
            "files that are not UTF-8 are skipped; give a folder with text by --data.path"
        )
    return documents


def _file(path: str) -> bytes:
    text = _bytes_of(path)
    if not text:
        raise InputOutputError(f"{path!r} is empty; give a file that holds text by --data.path")
    try:
        text.decode()
    except UnicodeDecodeError as error:
        raise InputOutputError(
            f"{path!r} is not UTF-8 text ({error.reason} at byte {error.start} of {len(text)}); "
            "convert it, for instance with iconv, or give another file by --data.path"
        ) from None
    return text


def _walk(
    root: str, skip: Callable[[str], bool], on_error: Callable[[OSError], None] | None = None
) -> Iterator[str]:
    """Paths (with ``/``, relative to ``root``, sorted) of the regular files below ``root``.

    Symbolic links are left out: one that leads outside would not be part of the folder, one that
    leads inside would put the same text on both sides of the split.
    """
    found = []
    for folder, folders, names in os.walk(root, onerror=on_error):
        folders[:] = [name for name in folders if not skip(name)]
        paths = [Path(folder, name) for name in names if not skip(name)]
        found += [path for path in paths if path.is_file() and not path.is_symlink()]
    yield from sorted(path.relative_to(root).as_posix() for path in found)


def _bytes_of(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from None


def _refuse(error: OSError) -> None:
    raise _unreadable(error.filename, error) from None


def _unreadable(path: str, error: OSError) -> InputOutputError:
    return InputOutputError(
        f"{path!r} cannot be read ({error.strerror}); make it readable, "
        "or give another text by --data.path"
    )


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def _split(documents: dict[str, bytes]) -> tuple[tuple[bytes, ...], tuple[bytes, ...]]:
    train = tuple(text for file, text in documents.items() if not _is_validation(file))
    validation = tuple(text for file, text in documents.items() if _is_validation(file))
    if train and validation:
        return train, validation
    return _split_by_position(train or validation)


def _is_validation(file: str) -> bool:
    digest = hashlib.sha256(os.fsencode(file)).digest()
    return int.from_bytes(digest[:8], "big") % 10 == 0


def _split_by_position(
    documents: tuple[bytes, ...],
) -> tuple[tuple[bytes, ...], tuple[bytes, ...]]:
    """The last tenth of the bytes for validation, cut between two characters."""
    total = sum(map(len, documents))
    left = total - max(1, total // 10)
    train, validation = [], []
    for document in documents:
        cut = min(left, len(document))
        while 0 < cut < len(document) and document[cut] & 0xC0 == 0x80:  # inside a character
            cut += 1
        train.append(document[:cut])
        validation.append(document[cut:])
        left -= cut
    return tuple(filter(None, train)), tuple(filter(None, validation))
