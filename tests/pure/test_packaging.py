"""The package as it is installed: no room is forgotten, kernels bring their sources."""

from __future__ import annotations

import configparser
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCE_ROOTS = {"mpmp": ROOT, "mpmp_kernels": ROOT / "kernels"}


def options() -> configparser.ConfigParser:
    found = configparser.ConfigParser()
    found.read(ROOT / "setup.cfg")
    return found


def rooms() -> set[str]:
    """Every folder with an ``__init__.py``, by the name under which it is imported."""
    return {
        ".".join(path.parent.relative_to(root).parts)
        for top, root in SOURCE_ROOTS.items()
        for path in (root / top).rglob("__init__.py")
    }


def test_every_room_is_listed_and_nothing_else() -> None:
    listed = options()["options"]["packages"].split()
    assert sorted(listed) == sorted(set(listed))
    found = rooms()
    assert set(listed) == found, (
        f"packages of setup.cfg: add {sorted(found - set(listed))}, "
        f"take out {sorted(set(listed) - found)}"
    )


def test_every_folder_with_code_is_a_room() -> None:
    """A folder without ``__init__.py`` is imported from the repository and missing in a wheel."""
    for top, root in SOURCE_ROOTS.items():
        for path in (root / top).rglob("*.py"):
            assert (path.parent / "__init__.py").exists(), path


def test_what_is_no_python_is_packed_as_well() -> None:
    patterns = options()["options.package_data"]["*"].replace(",", " ").split()
    for top, root in SOURCE_ROOTS.items():
        for path in (root / top).rglob("*"):
            if path.is_file() and path.suffix not in (".py", ".pyc"):
                assert any(path.match(pattern) for pattern in patterns), path
        assert (root / top / "py.typed").exists()


def test_rooms_are_found_under_both_roots() -> None:
    where = dict(
        map(str.strip, line.split("="))
        for line in options()["options"]["package_dir"].strip().splitlines()
    )
    assert where == {top: str((root / top).relative_to(ROOT)) for top, root in SOURCE_ROOTS.items()}
