"""Which text is read, how it is split, and what is refused."""

import os
import sys
from pathlib import Path

import pytest

from mpmp.data.corpus import read
from mpmp.errors import InputOutputError


def folder(root: Path, files: dict[str, bytes | str]) -> str:
    for name, text in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(text.encode() if isinstance(text, str) else text)
    return str(root)


def many(number: int) -> dict[str, bytes | str]:
    return {f"part/{i}.txt": f"text of file {i}\n" for i in range(number)}


def test_the_default_is_real_text_about_a_tenth_of_it_for_validation() -> None:
    text = read(None)
    assert text == read(None)
    sizes = [sum(map(len, side)) for side in (text.train, text.validation)]
    assert sum(sizes) > 1e6
    assert 0.03 < sizes[1] / sum(sizes) < 0.25
    assert any(b"def namedtuple" in document for document in text.train + text.validation)
    assert "Python" in text.name


def test_split_is_by_file_disjoint_and_complete(tmp_path: Path) -> None:
    text = read(folder(tmp_path, many(200)))
    assert set(text.train) | set(text.validation) == {str(t).encode() for t in many(200).values()}
    assert not set(text.train) & set(text.validation)
    assert 5 <= len(text.validation) <= 45


def test_a_file_stays_on_its_side_whatever_is_added(tmp_path: Path) -> None:
    few = read(folder(tmp_path / "few", many(100)))
    more = read(folder(tmp_path / "more", many(150)))
    assert set(few.train) <= set(more.train)
    assert set(few.validation) <= set(more.validation)


def test_documents_come_in_the_order_of_their_paths(tmp_path: Path) -> None:
    text = read(folder(tmp_path, {f"{i:03}": f"{i:03}" for i in reversed(range(100))}))
    assert list(text.train) == sorted(text.train)
    assert list(text.validation) == sorted(text.validation)


def test_one_file_is_cut_by_position(tmp_path: Path) -> None:
    path = folder(tmp_path, {"a.txt": bytes(range(100))}) + "/a.txt"
    text = read(path)
    assert text.train == (bytes(range(90)),)
    assert text.validation == (bytes(range(90, 100)),)


def test_a_cut_falls_between_characters(tmp_path: Path) -> None:
    for length in range(10, 60):
        text = read(folder(tmp_path, {"a.txt": "x" * (length % 4) + "\N{GRINNING FACE}" * length}))
        for document in text.train + text.validation:
            document.decode()
        assert text.train and text.validation


def test_a_folder_that_would_leave_a_side_empty_is_cut_by_position(tmp_path: Path) -> None:
    text = read(folder(tmp_path, {name: name.encode() * 30 for name in "bde"}))
    assert text.train == (b"b" * 30, b"d" * 30, b"e" * 21)
    assert text.validation == (b"e" * 9,)


def test_binary_hidden_empty_and_linked_files_are_skipped(tmp_path: Path) -> None:
    (tmp_path / "outside.txt").write_text("outside")
    files = {
        "a.txt": "first",
        "b.weird": "second",
        "no_extension": "third",
        "image.png": b"\x89PNG\xff\xfe",
        "empty.txt": b"",
        ".hidden": "hidden",
        ".git/config": "hidden, too",
    }
    root = folder(tmp_path / "text", files)
    os.symlink(tmp_path / "outside.txt", f"{root}/link.txt")
    os.symlink(tmp_path, f"{root}/folder")
    text = read(root)
    assert b"".join(text.train + text.validation) == b"firstsecondthird"


@pytest.mark.parametrize(
    "name", ["with spaces/my text.txt", "日本語/テキスト.txt", "naïve/ünï.txt"]
)
def test_paths_may_hold_spaces_and_any_script(tmp_path: Path, name: str) -> None:
    folder(tmp_path, {name: "some text\n" * 10})
    from_file, from_folder = read(str(tmp_path / name)), read(str((tmp_path / name).parent))
    assert from_file.train == from_folder.train != ()
    assert from_file.name == str(tmp_path / name)


@pytest.mark.skipif(sys.platform != "linux", reason="names are any bytes on Linux only")
def test_a_file_name_that_is_no_utf8(tmp_path: Path) -> None:
    Path(os.fsdecode(bytes(tmp_path) + b"/\xff.txt")).write_text("some text\n" * 10)
    assert read(str(tmp_path)).validation == (b"some text\n",)


def test_a_home_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", folder(tmp_path, {"a.txt": "some text\n" * 10}))
    assert read("~/a.txt").validation == (b"some text\n",)


def refusal(path: str) -> str:
    with pytest.raises(InputOutputError) as caught:
        read(path)
    assert caught.value.exit_code == 74
    message = str(caught.value)
    assert path in message and "data.path" in message and "\n" not in message
    return message


def test_what_is_missing_empty_or_no_text_is_refused(tmp_path: Path) -> None:
    folder(tmp_path, {"empty.txt": b"", "binary": b"ab\xff", "sub/binary": b"\xff"})
    assert "does not exist" in refusal(str(tmp_path / "missing"))
    assert "does not exist" in refusal("")
    assert "empty" in refusal(str(tmp_path / "empty.txt"))
    assert "byte 2 of 3" in refusal(str(tmp_path / "binary"))
    assert "no text" in refusal(str(tmp_path / "sub"))
    os.mkfifo(tmp_path / "fifo")
    assert "neither a file nor a folder" in refusal(str(tmp_path / "fifo"))


def test_what_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A root user may read everything, so the file system's refusal is played."""
    root = folder(tmp_path, {"a.txt": "text", "sub/b.txt": "text"})

    def denied(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", denied)
        assert "Permission denied" in refusal(f"{root}/a.txt")
        with pytest.raises(InputOutputError, match=r"a\.txt' cannot be read \(Permission denied\)"):
            read(root)

    listed = os.scandir

    def unlisted(path: str) -> object:
        if str(path).endswith("sub"):
            raise PermissionError(13, "Permission denied", path)
        return listed(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", unlisted)
        with pytest.raises(InputOutputError, match=r"sub' cannot be read \(Permission denied\)"):
            read(root)


def test_a_python_without_source_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
    with pytest.raises(InputOutputError, match=r"no source .* give a text by --data\.path"):
        read(None)


def test_installed_packages_are_no_part_of_the_standard_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {"a.py": "x" * 20, "sub/b.py": "y" * 20, "data.txt": "no source", "bad.py": b"\xff"}
    for skipped in ("site-packages", "dist-packages", "__pycache__"):
        files |= {f"{skipped}/c.py": "no", f"sub/{skipped}/c.py": "no"}
    folder(tmp_path, files)
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
    text = read(None)
    assert b"".join(text.train + text.validation) == b"x" * 20 + b"y" * 20
