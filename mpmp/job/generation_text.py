"""A prompt and what follows it: tokens become text as they come, until something ends them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mpmp.data.tokens import Tokenizer

_BROKEN = "\ufffd"
"""Stands in a decoded text where bytes are no character, or none yet."""
_WINDOW = 8
"""Tokens that are decoded again with new ones: tokenizers join some to their neighbours."""
_CHARACTER = 4
"""Most tokens of a character: UTF-8 has four bytes at most."""


@dataclass(frozen=True)
class Ends:
    """What ends a continuation."""

    tokens: int
    """Most tokens that are added to a prompt."""
    context: int
    """Most tokens of a prompt and its continuation."""
    texts: tuple[str, ...] = ()
    """Texts that are not shown and end it."""
    numbers: frozenset[int] = frozenset()
    """Tokens that are not shown and end it."""


class Continuation:
    """One prompt and the tokens behind it, which every rank of a replica follows alike."""

    def __init__(
        self, number: int, prompt: Sequence[int], tokenizer: Tokenizer, ends: Ends
    ) -> None:
        self.number, self.prompt, self.ends = number, list(prompt), ends
        self.tokens: list[int] = []
        self.ended = ""
        """Why no more comes, in words; empty while more does."""
        self._decoded = Decoded(tokenizer, self.prompt)
        self._text, self._cut = "", False
        self._read = self._given = 0

    def __len__(self) -> int:
        """Tokens, the prompt's counted in."""
        return len(self.prompt) + len(self.tokens)

    @property
    def text(self) -> str:
        """What follows the prompt, without what ended it."""
        self._decode()
        return self._text

    def add(self, token: int) -> None:
        """The next token."""
        self.tokens.append(token)
        if token in self.ends.numbers:
            self.ended = "end of text"
        elif self.ends.texts and (stop := self._stopped()):
            self.ended = f"{stop!r} was reached"
        elif len(self) >= self.ends.context:
            self.ended = f"the context of {self.ends.context} tokens is full"
        elif len(self.tokens) >= self.ends.tokens:
            self.ended = f"{len(self.tokens)} tokens"

    def fresh(self) -> str:
        """Text that was not given yet and that no later token takes back."""
        sure = len(self.text)
        if not self.ended:
            sure -= max((_begun(self._text, stop) for stop in self.ends.texts), default=0)
        self._given, start = max(sure, self._given), self._given
        return self._text[start : self._given]

    def _decode(self) -> None:
        """Read the tokens that were not read yet, but the one that ended it."""
        stop = len(self.tokens)
        if self.ended and self.tokens[-1] in self.ends.numbers:
            stop -= 1
        self._text += self._decoded.add(self.tokens[self._read : stop])
        self._read = max(stop, self._read)
        if self.ended and not self._cut:
            self._text += self._decoded.rest()

    def _stopped(self) -> str:
        """The first text that ends it, if there is one; it is cut off."""
        longest = max(map(len, self.ends.texts))
        start = max(0, len(self._text) - longest + 1)
        self._decode()
        places = [
            (at, stop) for stop in self.ends.texts if (at := self._text.find(stop, start)) >= 0
        ]
        if not places:
            return ""
        at, stop = min(places)
        self._text, self._cut = self._text[:at], True
        return stop


class Decoded:
    """The text of tokens as they come; bytes that may become a character are held back."""

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._shown = 0
        """Characters of the window's text that were given."""
        self._begin(list(before))

    def add(self, tokens: Sequence[int]) -> str:
        """The text that further tokens make certain."""
        if not tokens:
            return ""
        self._window += tokens
        text = self._tokenizer.decode(self._window)
        # Of bytes that end too early a decoder makes one mark, or one of each byte.
        certain = text.rstrip(_BROKEN)
        fresh, self._shown = certain[self._shown :], max(self._shown, len(certain))
        if certain == text and len(self._window) >= 2 * _WINDOW:
            self._begin(self._window)
        return fresh

    def rest(self) -> str:
        """What is held back, as it is."""
        fresh = self._tokenizer.decode(self._window)[self._shown :]
        self._shown += len(fresh)
        return fresh

    def _begin(self, tokens: list[int]) -> None:
        """A window of the last tokens, its first no later byte of a character, if that can be."""
        for more in range(_CHARACTER):
            self._window = tokens[-_WINDOW - more :]
            text = self._tokenizer.decode(self._window)
            self._shown = len(text)
            if not text.startswith(_BROKEN):
                break


def _begun(text: str, stop: str) -> int:
    """How many of the last characters may be the beginning of a text that ends it."""
    lengths = range(min(len(stop) - 1, len(text)), 0, -1)
    return next((length for length in lengths if text.endswith(stop[:length])), 0)
