"""CoNLL files: what is read, what is converted, and what is named by file and line."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpmp.data import conll
from mpmp.data.entities import entities
from mpmp.errors import InputOutputError

TAGS = [("O",), ("B-a", "I-a"), ("B-b",), ("B-b", "I-b", "I-b")]


def words_and_tags(text: str) -> list[tuple[tuple[str, ...], tuple[str, ...], int]]:
    return [(one.words, one.tags, one.line) for one in conll.parse(text, "f").sentences]


def test_sentences_lines_and_columns() -> None:
    text = (
        "-DOCSTART- -X- O O\n\nEU NNP I-NP B-ORG\nrejects VBZ I-VP O\n\n \t\r\nPeter NNP I-NP B-PER"
    )
    assert words_and_tags(text) == [
        (("EU", "rejects"), ("B-ORG", "O"), 3),
        (("Peter",), ("B-PER",), 7),
    ]
    # A word between tabs may hold blanks, and what other alphabets take for the end of a line.
    assert words_and_tags("New York\tB-a\r\na\u2028b\u00a0\tO\r\n\r\n#\tO\n") == [
        (("New York", "a\u2028b\u00a0"), ("B-a", "O"), 1),
        (("#",), ("O",), 4),
    ]


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("", 1, "there is no sentence"),
        ("\n \n\t\n-DOCSTART- O\n", 1, "there is no sentence"),
        ("a O\nb\n", 2, "one column"),
        ("a O\n\nb x O\n", 3, "3 columns, where line 1 has 2"),
        ("-DOCSTART- O\n\na\tO\n\tO\n", 4, "no word"),
        ("a O\nb PER\n", 2, "'PER'"),
        ("a O\nb B-\n", 2, "'B-'"),
        ("a S-PER\n", 1, "'S-PER'"),
        ("a\tO\nb\tO\t\n", 2, "3 columns"),
        # B- begins what stands alone, as in IOB2, and I- begins something, as in IOB1.
        ("a B-x\nb O\n\nc I-x\n", 4, "I-x follows O, but in IOB2 B-x begins an entity"),
        ("a B-x\nb I-y\n", 2, "I-y follows B-x"),
        ("a O\nb I-y\n\nc B-x\n", 2, "B- of line 4"),
    ],
)
def test_bad_lines_are_named(text: str, line: int, words: str) -> None:
    with pytest.raises(InputOutputError) as caught:
        conll.parse(text, "some/file.conll")
    assert str(caught.value).startswith(f"some/file.conll:{line}: ")
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_bad_bytes_are_named(tmp_path: Path) -> None:
    path = tmp_path / "train.conll"
    path.write_bytes(b"a O\nb O\nc\xff O\n")
    with pytest.raises(InputOutputError, match=r"train\.conll:3: no UTF-8"):
        conll.read(str(path))
    path.write_bytes(b"\xef\xbb\xbfa O\n")
    assert conll.read(str(path)).sentences[0].words == ("a",)
    with pytest.raises(InputOutputError, match=r"nowhere.*No such file"):
        conll.read(str(tmp_path / "nowhere"))


@given(st.lists(st.lists(st.sampled_from(TAGS), min_size=1, max_size=6), min_size=1, max_size=6))
def test_iob1_becomes_what_it_means(sentences: list[list[tuple[str, ...]]]) -> None:
    """Each sentence written in IOB1 reads as it was in IOB2."""
    whole = [tuple(tag for entity in one for tag in entity) for one in sentences]
    lines = []
    for tags in whole:
        before = "O"
        for tag in tags:
            same = tag[1:] == before[1:]
            lines.append("w " + (tag if tag[0] != "B" or same else f"I{tag[1:]}"))
            before = tag
        lines.append("")
    read = conll.parse("\n".join(lines), "f")
    assert [one.tags for one in read.sentences] == whole
    assert read.converted == any(tag[0] == "B" for tags in whole for tag in tags)


@given(st.lists(st.lists(st.sampled_from(TAGS), min_size=1, max_size=6), min_size=1, max_size=6))
def test_what_is_written_is_read(sentences: list[list[tuple[str, ...]]]) -> None:
    tags = [tuple(tag for entity in one for tag in entity) for one in sentences]
    made = [conll.Sentence(tuple("w" for _ in one), one, 1) for one in tags]
    text = "\n\n".join("\n".join(f"w\tX\t{tag}" for tag in one.tags) for one in made)
    assert [one.tags for one in conll.parse(text, "f").sentences] == tags


def test_predictions_stand_beside_the_gold_tags(tmp_path: Path) -> None:
    read = conll.parse("New York\tB-a\nis\tO\n\nit\tO\n", "f")
    conll.write(tmp_path / "p", read.sentences, [["B-a", "I-a"], ["O"]])
    text = (tmp_path / "p").read_bytes().decode()
    assert text == "New York\tB-a\tB-a\nis\tO\tI-a\n\nit\tO\tO\n\n"


@pytest.mark.parametrize(
    "names",
    [
        ("train.conll", "dev.conll", "test.conll"),
        ("eng.train", "eng.testa", "eng.testb"),
        ("wnut-train.iob2", "wnut_validation.iob2", "wnut.test.txt"),
    ],
)
def test_files_are_found_by_their_names(tmp_path: Path, names: tuple[str, ...]) -> None:
    for name in (*names, "README.md", "train.json", "trained.txt"):
        (tmp_path / name).touch()
    found = conll.find(str(tmp_path))
    assert found == {
        split: str(tmp_path / name) for split, name in zip(conll.SPLITS, names, strict=True)
    }


def test_files_that_are_missing_or_twice_there(tmp_path: Path) -> None:
    (tmp_path / "train.conll").touch()
    with pytest.raises(InputOutputError, match="no file of the validation split"):
        conll.find(str(tmp_path))
    (tmp_path / "dev.conll").touch()
    assert set(conll.find(str(tmp_path))) == {"train", "validation"}
    (tmp_path / "valid.txt").touch()
    with pytest.raises(InputOutputError, match=r"dev\.conll and .*valid\.txt both"):
        conll.find(str(tmp_path))
    with pytest.raises(InputOutputError, match="cannot be read"):
        conll.find(str(tmp_path / "nowhere"))


def test_an_entity_ends_where_another_begins() -> None:
    assert entities(["I-a", "I-a", "B-a", "I-b", "O", "I-b"]) == {
        ("a", 0, 2),
        ("a", 2, 3),
        ("b", 3, 4),
        ("b", 5, 6),
    }
