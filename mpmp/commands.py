"""The command line of every command: a recipe, then flags, later over earlier.

    --recipe FILE.toml      sections and settings as in config.py
    --layout dp2.pp2.tp2    sets the axes of the parallel section at once
    --section.key value     one setting

Nothing here starts MPI: a mistake is reported, and ``--help`` answered, by the launcher's rank 0
(or a process without a launcher) alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import re
import sys
import tomllib
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn, TypeVar

import tyro

from mpmp.config import Config, parse_layout
from mpmp.errors import ConfigError, MpmpError
from mpmp.launcher import say_once, told_rank

T = TypeVar("T")

_LARGEST_RECIPE = 64 * 1024
_OWN_FLAGS = """

--recipe FILE.toml takes settings from a file, --layout dp2.pp2.tp2 sets the axes of the parallel
section at once; flags win over both."""


def parse(program: str, description: str, default: Config, arguments: Sequence[str]) -> Config:
    """The configuration of a command line; ends the process where it is wrong."""
    with guarded():
        rest, default = _take_own_flags(list(arguments), default)
        _refuse_unknown(rest, default)
        return cli(Config, program, description + _OWN_FLAGS, rest, default)


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """What goes wrong before MPI has started ends the process with one line and its code."""
    try:
        yield
    except MpmpError as error:
        fail(error)


def fail(error: MpmpError) -> NoReturn:
    """Report a mistake before MPI has started: one line, by one rank, then its exit code."""
    say_once(str(error))
    sys.exit(error.exit_code)


def _take_own_flags(arguments: list[str], default: Config) -> tuple[list[str], Config]:
    """Apply --recipe and --layout to the default, and leave the other arguments."""
    rest: list[str] = []
    recipe = layout = None
    while arguments:
        flag, has_value, value = arguments.pop(0).partition("=")
        if flag not in ("--recipe", "--layout"):
            rest.append(flag + has_value + value)
            continue
        if not has_value:
            if not arguments:
                raise ConfigError(f"{flag} needs a value")
            value = arguments.pop(0)
        if flag == "--recipe":
            recipe = value
        else:
            layout = value
    if recipe is not None:
        default = read_recipe(recipe, default)
    if layout is not None:
        axes: dict[str, Any] = {"data": None} | parse_layout(layout)
        parallel = dataclasses.replace(default.parallel, **axes)
        default = dataclasses.replace(default, parallel=parallel)
    return rest, default


def read_recipe(path: str, default: Config) -> Config:
    """A TOML recipe over the default; unknown keys and wrong types are refused by name."""
    try:
        with open(path, "rb") as file:
            text = file.read(_LARGEST_RECIPE + 1)
        if len(text) > _LARGEST_RECIPE:
            raise ConfigError(f"recipe {path} is longer than {_LARGEST_RECIPE} bytes")
        tables = tomllib.loads(text.decode())
    except OSError as error:
        raise ConfigError(f"recipe {path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # a number of 5000 digits, 1000 brackets
        raise ConfigError(f"recipe {path} is not TOML: {error}") from error
    sections = {field.name: field for field in dataclasses.fields(Config)}
    changed: dict[str, Any] = {}
    for name, values in tables.items():
        _known(name, sections, f"recipe {path} has an unknown section")
        if not isinstance(values, dict):
            raise ConfigError(f"recipe {path}: {name} must be a section, [{name}]")
        section = getattr(default, name)
        keys = {field.name: field for field in dataclasses.fields(section)}
        for key, value in values.items():
            _known(key, keys, f"recipe {path} has an unknown setting in [{name}]:")
            values[key] = _typed(path, f"{name}.{key}", value, str(keys[key].type))
        changed[name] = dataclasses.replace(section, **values)
    return dataclasses.replace(default, **changed)


def _typed(path: str, name: str, value: Any, annotation: str) -> Any:
    """The value if its type is that of the field; integers pass for floats."""
    if match := re.match(r"Literal\[(.*)\]", annotation):
        if repr(value) in match[1].replace('"', "'").split(", "):
            return value
        raise ConfigError(f"recipe {path}: {name} must be one of {match[1]}, not {value!r}")
    kinds = {"int": int, "float": (int, float), "str": str, "bool": bool}
    wanted = kinds[annotation.split(" | ")[0]]
    if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):  # type: ignore[arg-type]
        raise ConfigError(f"recipe {path}: {name} must be {annotation}, not {value!r}")
    return float(value) if wanted == (int, float) else value


def _known_flag(name: str, flags: dict[str, Any]) -> None:
    if name in flags:
        return
    near = difflib.get_close_matches(name, [*flags, "recipe", "layout"], n=1)
    hint = f"did you mean --{near[0]}?" if near else "see --help"
    raise ConfigError(f"unknown flag --{name}; {hint}")


def _known(name: str, table: dict[str, Any], sentence: str) -> None:
    if name in table:
        return
    near = difflib.get_close_matches(name, table, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(table)}"
    raise ConfigError(f"{sentence} {name!r}; {hint}")


def _refuse_unknown(arguments: list[str], default: Config) -> None:
    flags = {
        f"{section.name}.{field.name}": field
        for section in dataclasses.fields(Config)
        for field in dataclasses.fields(getattr(default, section.name))
    }
    for argument in arguments:
        if argument.startswith("--") and argument != "--help":
            name = argument[2:].partition("=")[0].replace("-", "_")
            positive = re.sub(r"\.no_", ".", name)
            _known_flag(name if name in flags else positive, flags)


def cli(kind: type[T], program: str, description: str, arguments: Sequence[str], default: T) -> T:
    """tyro's reading of the arguments; what it finds wrong becomes a ConfigError of one line."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(
                kind,
                prog=program,
                description=description,
                default=default,
                args=arguments,
                use_underscores=True,
                console_outputs=told_rank() == 0,
            )
    except SystemExit as left:
        if not left.code:
            raise
        raise ConfigError(_one_line(said.getvalue())) from None


def _one_line(box: str) -> str:
    """The sentence of tyro's box: what stands between its title and its advice."""
    lines = [line.strip("│ ") for line in box.splitlines()]
    inside = [line for line in lines if line and line[0] not in "╭╰"]
    if box.lstrip().startswith("╭"):
        inside.insert(0, "")  # the title is part of the frame, not a line of its own
    sentence: list[str] = []
    for line in inside[1:]:
        if set(line) <= set("─-"):
            if sentence:
                break
            continue
        if line.startswith("Got errors"):
            break
        sentence.append(line)
    return f"{' '.join(sentence) or 'the arguments are not understood'}; see --help"
