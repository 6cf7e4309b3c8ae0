"""Word pieces (Schuster and Nakajima 2012): learnt from words, or read from a tokenizer's file.

    Redondo -> Red ##ond ##o       a piece that begins no word is written with ##

Both are the library ``tokenizers``; the file is its tokenizer.json. Beside pieces of words a
vocabulary has [PAD], [UNK] for what has no pieces, [CLS] and [SEP] around a sequence, [MASK].
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from mpmp.errors import ConfigError

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_MOST_CHARACTERS = 1000
"""Kept of an alphabet, the most frequent: words of rare ones are [UNK], as in BERT."""


class WordPieces:
    """Cuts words into pieces; ``text`` is that of a tokenizer's file and ``source`` names it."""

    def __init__(self, text: str, source: str) -> None:
        try:
            self._library = _library().Tokenizer.from_str(text)
        except ConfigError:
            raise
        except Exception as error:  # the library raises bare Exceptions
            raise ConfigError(
                f"{source} is no tokenizer file of Hugging Face tokenizers ({error}); give a "
                "tokenizer.json"
            ) from None
        self.file = text
        self._library.no_truncation()
        self._library.no_padding()
        numbers = self._library.get_vocab(with_added_tokens=True)
        missing = [name for name in ("[UNK]", "[CLS]", "[SEP]") if name not in numbers]
        if missing:
            raise ConfigError(
                f"{source} has no {' and no '.join(missing)}: its pieces are not those of a BERT"
            )
        self.vocabulary = 1 + max(numbers.values())
        self.unknown, self.begin, self.end = (numbers[f"[{n}]"] for n in ("UNK", "CLS", "SEP"))
        self.padding = numbers.get("[PAD]", 0)

    def cut(self, words: Iterable[str]) -> dict[str, tuple[int, ...]]:
        """The pieces of each word, at least one.

        A word of characters that the tokenizer strips, as U+FE0F alone, is [UNK]: none is lost.
        """
        distinct = list(dict.fromkeys(words))
        found = self._library.encode_batch(distinct, add_special_tokens=False)
        return {
            word: tuple(one.ids) or (self.unknown,)
            for word, one in zip(distinct, found, strict=True)
        }


def learn(words: Sequence[str], size: int) -> str:
    """The text of a tokenizer's file with ``size`` pieces of the words; case matters.

    There are more where the characters alone, at the beginning of a word and inside, are more.
    The same words give the same text. Left alone the library numbers characters in the order of a
    hash table, which changes from run to run, and breaks ties between pairs by those numbers; so
    it is given the characters in order.
    """
    library = _library()
    normalizer = library.normalizers.BertNormalizer(lowercase=False)
    splitter = library.pre_tokenizers.BertPreTokenizer()
    count: Counter[str] = Counter()
    for word, times in Counter(words).items():
        for part, _ in splitter.pre_tokenize_str(normalizer.normalize_str(word)):
            for character in part:
                count[character] += times
    frequent = sorted(count, key=lambda one: (-count[one], one))[:_MOST_CHARACTERS]
    characters = sorted(frequent)
    alphabet = [*characters, *(f"##{one}" for one in characters)]
    made = library.Tokenizer(library.models.WordPiece(unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizer, splitter
    trainer = library.trainers.WordPieceTrainer(
        vocab_size=size,
        special_tokens=[*SPECIAL, *alphabet],
        initial_alphabet=characters,
        limit_alphabet=len(characters),
        show_progress=False,
    )
    made.train_from_iterator(words, trainer)
    # Anew, because the one that was trained takes the characters for special tokens.
    vocabulary = made.get_vocab()
    made = library.Tokenizer(library.models.WordPiece(vocabulary, unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizer, splitter
    made.decoder = library.decoders.WordPiece()
    made.add_special_tokens(list(SPECIAL))
    ends = [(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")]
    made.post_processor = library.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
    )
    return str(made.to_str(pretty=True))


def _library() -> Any:
    try:
        import tokenizers
        import tokenizers.decoders
        import tokenizers.models
        import tokenizers.normalizers
        import tokenizers.pre_tokenizers
        import tokenizers.processors
        import tokenizers.trainers
    except ImportError as error:
        raise ConfigError(
            f"task tagging needs the package tokenizers ({error}); install it by pip install "
            "tokenizers"
        ) from None
    return tokenizers
