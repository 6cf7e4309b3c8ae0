"""Bytes and tokenizer files: what is encoded is decoded, what is broken is refused."""

import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpmp.config import Data
from mpmp.data.loader import load
from mpmp.data.tokens import ByteTokenizer, FileTokenizer, tokenizer_of
from mpmp.errors import ConfigError, InputOutputError

tokenizers = pytest.importorskip("tokenizers")

TEXT = "the quick brown fox jumps over the lazy dog; naïve 日本語 text\n" * 20


def byte_pairs(path: Path, specials: tuple[str, ...] = (), vocabulary: int = 300) -> str:
    """A byte-level tokenizer file, trained on a small text."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(specials),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([TEXT], trainer)
    made.save(str(path))
    return str(path)


@given(st.text())
def test_bytes_come_back(text: str) -> None:
    bytes_ = ByteTokenizer()
    ids = bytes_.encode(text)
    assert ids.dtype == np.uint16 and bytes_.vocabulary == 257
    assert ids.tolist() == list(text.encode())
    assert np.array_equal(ids, bytes_.encode(text.encode()))
    assert bytes_.decode(ids) == text


def test_bytes_that_are_no_text_are_shown_all_the_same() -> None:
    assert ByteTokenizer().decode([104, 105, 256, 0xFF, 33]) == "hi\n\N{REPLACEMENT CHARACTER}!"
    assert ByteTokenizer().decode([97, 257, 353, 98]) == "a??b"
    assert ByteTokenizer().decode([]) == ""


def test_a_tokenizer_file_encodes_and_decodes(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(byte_pairs(tmp_path / "a tokenizer.json", ("<|endoftext|>",)))
    ids = tokenizer.encode(TEXT)
    assert tokenizer.vocabulary == 300
    assert ids.dtype == np.uint16 and ids.max() < 300
    assert len(ids) < len(TEXT.encode())
    assert tokenizer.decode(ids) == TEXT
    assert np.array_equal(ids, tokenizer.encode(TEXT.encode()))
    end = tokenizer.end_of_text
    assert end == 0
    assert tokenizer.decode([*ids, end, *ids]) == TEXT + "\n" + TEXT
    assert tokenizer.decode([]) == ""


@pytest.mark.parametrize(
    ("specials", "expected"),
    [
        ((), None),
        (("[PAD]", "[SEP]"), "[SEP]"),
        (("<s>", "</s>"), "</s>"),
        (("</s>", "<|endoftext|>"), "<|endoftext|>"),
    ],
)
def test_end_of_text_is_written_where_the_file_has_one(
    tmp_path: Path, specials: tuple[str, ...], expected: str | None
) -> None:
    path = byte_pairs(tmp_path / "tokenizer.json", specials)
    tokenizer = FileTokenizer(path)
    numbers = tokenizers.Tokenizer.from_file(path).get_vocab()
    assert tokenizer.end_of_text == (None if expected is None else numbers[expected])
    assert tokenizer.decode(tokenizer.encode("the fox")) == "the fox"

    (tmp_path / "text").mkdir()
    for name in "bde":  # all on one side by their hashes, so cut by position
        (tmp_path / "text" / name).write_text(TEXT)
    corpus = load(Data(path=str(tmp_path / "text"), tokenizer=path))
    both = [*corpus.train.tolist(), *corpus.validation.tolist()]
    ends = 0 if expected is None else both.count(tokenizer.end_of_text)
    assert ends == (0 if expected is None else 4)  # three files, one of them cut


def test_the_files_own_truncation_padding_and_specials_are_off(tmp_path: Path) -> None:
    path = byte_pairs(tmp_path / "tokenizer.json", ("[SEP]",))
    plain = FileTokenizer(path).encode(TEXT)
    made = tokenizers.Tokenizer.from_file(path)
    made.enable_truncation(8)
    made.enable_padding(length=2000)
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A [SEP]", special_tokens=[("[SEP]", 0)]
    )
    made.save(path)
    assert np.array_equal(FileTokenizer(path).encode(TEXT), plain)


def test_a_long_text_is_encoded_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = FileTokenizer(byte_pairs(tmp_path / "tokenizer.json"))
    whole = tokenizer.encode(TEXT)
    assert tokenizer.decode(whole) == TEXT
    monkeypatch.setattr("mpmp.data.tokens._PIECE", 100)
    assert np.array_equal(tokenizer.encode(TEXT), whole)  # lines of 63 characters
    monkeypatch.setattr("mpmp.data.tokens._PIECE", 7)
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT


def test_numbers_may_have_holes(tmp_path: Path) -> None:
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 70_000}, unk_token="a"))
    made.save(str(tmp_path / "t.json"))
    tokenizer = FileTokenizer(str(tmp_path / "t.json"))
    assert tokenizer.vocabulary == 70_001
    assert tokenizer.encode("b").tolist() == [70_000]
    assert tokenizer.encode("b").dtype == np.uint32


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"not json", b"\xff\x00", b'{"model": {"type": "X"}}']
)
def test_a_broken_file_is_refused_with_the_reason(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.json"
    path.write_bytes(content)
    with pytest.raises(
        ConfigError, match=r"broken\.json' is no tokenizer file .*\(.+\); give"
    ) as e:
        FileTokenizer(str(path))
    assert "\n" not in str(e.value)


def test_an_untrained_tokenizer_is_refused(tmp_path: Path) -> None:
    tokenizers.Tokenizer(tokenizers.models.BPE()).save(str(tmp_path / "new.json"))
    with pytest.raises(ConfigError, match=r"new\.json' has 0 tokens"):
        FileTokenizer(str(tmp_path / "new.json"))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "missing.json", tmp_path):
        with pytest.raises(InputOutputError, match=f"{path}' cannot be read") as caught:
            FileTokenizer(str(path))
        assert caught.value.exit_code == 74


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ConfigError, match="pip install tokenizers"):
        FileTokenizer("t.json")
    assert ByteTokenizer().encode("a").tolist() == [97]
