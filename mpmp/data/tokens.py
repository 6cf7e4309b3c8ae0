"""Text as token numbers: bytes and one end-of-text token, or a Hugging Face tokenizer file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mpmp.errors import ConfigError, InputOutputError

Tokens: TypeAlias = NDArray[np.unsignedinteger[Any]]
"""Token numbers in the smallest unsigned integers that hold the vocabulary."""

_ENDS_OF_TEXT = ("<|endoftext|>", "</s>", "[SEP]")
_MASKS = ("[MASK]", "<mask>")
_PIECE = 1 << 20


class Tokenizer(Protocol):
    vocabulary: int
    """Token numbers lie in ``range(vocabulary)``."""
    end_of_text: int | None
    """The token written after each document, where there is one."""
    mask: int | None
    """The token that hides a word, where there is one."""
    file: str | None
    """Text of the tokenizer's file, where there is one."""

    def encode(self, text: bytes | str) -> Tokens: ...

    def decode(self, ids: Sequence[int] | NDArray[Any]) -> str:
        """Text to look at: bytes that are not UTF-8 are replaced, end-of-text is a new line."""
        ...


def tokenizer_of(path: str | None) -> Tokenizer:
    """The tokenizer of the setting ``data.tokenizer``."""
    return ByteTokenizer() if path is None else FileTokenizer(path)


class ByteTokenizer:
    """A token is a byte; 256 ends a text."""

    vocabulary: int = 257
    end_of_text: int | None = 256
    mask: int | None = None
    file: str | None = None

    def encode(self, text: bytes | str) -> Tokens:
        data = text.encode() if isinstance(text, str) else text
        return np.frombuffer(data, np.uint8).astype(np.uint16)

    def decode(self, ids: Sequence[int] | NDArray[Any]) -> str:
        array = np.asarray(ids, np.int64)
        # A model may have more tokens than there are bytes: they mean nothing.
        data = np.where(array > 255, ord("?"), array)
        data[array == self.end_of_text] = ord("\n")
        return data.astype(np.uint8).tobytes().decode(errors="replace")


class FileTokenizer:
    """A tokenizer file (``tokenizer.json``) read by Hugging Face's library ``tokenizers``.

    The file's own special tokens, truncation and padding are switched off: they shape the inputs
    of fine-tuned models, while a corpus is one long row of tokens. End-of-text is the first of
    <|endoftext|>, </s> and [SEP] that the file has.
    """

    def __init__(self, path: str) -> None:
        try:
            from tokenizers import Tokenizer as Library
        except ImportError as error:
            raise ConfigError(
                f"data.tokenizer {path!r} needs the package tokenizers ({error}); "
                "install it by pip install tokenizers, or leave the setting out to train on bytes"
            ) from None
        try:
            text = Path(path).read_bytes()
            self._library = Library.from_buffer(text)
        except OSError as error:
            raise InputOutputError(
                f"data.tokenizer {path!r} cannot be read ({error.strerror}); "
                "give a tokenizer file, or leave the setting out to train on bytes"
            ) from None
        except Exception as error:  # the library raises bare Exceptions
            raise ConfigError(
                f"data.tokenizer {path!r} is no tokenizer file of Hugging Face tokenizers "
                f"({error}); give a tokenizer.json, or leave the setting out to train on bytes"
            ) from None
        self.file: str | None = text.decode()
        self._library.no_truncation()
        self._library.no_padding()
        # The highest number counts, not the number of tokens: files may leave numbers out.
        numbers = self._library.get_vocab(with_added_tokens=True)
        self.vocabulary: int = 1 + max(numbers.values(), default=-1)
        if self.vocabulary == 0:
            raise ConfigError(f"data.tokenizer {path!r} has 0 tokens; give one that was trained")
        self.end_of_text: int | None = next(
            (numbers[name] for name in _ENDS_OF_TEXT if name in numbers), None
        )
        self.mask: int | None = next((numbers[name] for name in _MASKS if name in numbers), None)

    @property
    def opening(self) -> list[int]:
        """Tokens that the file itself puts in front of a text, as foreign models have learnt it."""
        plain = self._library.encode("a", add_special_tokens=False).ids
        whole = self._library.encode("a", add_special_tokens=True).ids
        places = (at for at in range(len(whole)) if whole[at : at + len(plain)] == plain)
        return list(whole[: next(places, 0)])

    def encode(self, text: bytes | str) -> Tokens:
        """A text longer than 1 MiB is cut into pieces of whole lines.

        The library keeps some 100 bytes a token, too much for a corpus in one file. Only a token
        that would have reached over the cut is another.
        """
        line = text if isinstance(text, str) else text.decode(errors="replace")
        found = [np.empty(0, np.min_scalar_type(self.vocabulary - 1))]
        start = 0
        while start < len(line):
            stop = start + _PIECE
            if stop < len(line):
                stop = line.rfind("\n", start, stop) + 1 or stop
            ids = self._library.encode(line[start:stop], add_special_tokens=False).ids
            found.append(np.asarray(ids, found[0].dtype))
            start = stop
        return np.concatenate(found)

    def decode(self, ids: Sequence[int] | NDArray[Any]) -> str:
        array = np.asarray(ids, np.int64)
        parts = np.split(array, np.flatnonzero(array == self.end_of_text))
        texts = [part[part != self.end_of_text].tolist() for part in parts]
        return "\n".join(self._library.decode(text, skip_special_tokens=False) for text in texts)
