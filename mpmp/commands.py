"""The command line of every command: a task, a recipe, then flags, later over earlier.

    --task tagging          what is learnt, and the settings it begins with
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
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

import tyro

from mpmp.config import Config, parse_layout
from mpmp.errors import ConfigError, MpmpError
from mpmp.launcher import say_once, told_rank

T = TypeVar("T")

_LARGEST_RECIPE = 64 * 1024
_OWN_FLAGS = """

--recipe FILE.toml takes settings from a file, --layout dp2.pp2.tp2 sets the axes of the parallel
section at once; flags win over both. --task tagging begins with settings of its own."""


def parse(
    program: str,
    description: str,
    default: Config,
    arguments: Sequence[str],
    tasks: Mapping[str, Config] | None = None,
) -> Config:
    """The configuration of a command line; ends the process where it is wrong.

    ``tasks`` is what each task that the command knows begins with, beside that of ``default``.
    """
    with guarded():
        known = {**(tasks or {}), default.task: default}
        rest, default = _take_own_flags(arguments, known, default)
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


def take(
    arguments: Sequence[str], valued: Collection[str], bare: Collection[str] = ()
) -> tuple[dict[str, str], list[str]]:
    """Flags that are no settings, with their values (``bare`` ones have none), and the rest.

    As in ``--table FILE``, ``--table=FILE``, ``--dry-run`` or ``--dry_run``; of several the last
    counts. ConfigError where a value is missing.
    """
    found, rest = dict[str, str](), list[str]()
    words = list(arguments)
    while words:
        word = words.pop(0)
        flag, has_value, value = word.partition("=")
        name = flag.replace("_", "-")
        if name in bare and not has_value:
            found[name] = ""
        elif name in valued:
            if not has_value and not words:
                raise ConfigError(f"{flag} needs a value")
            found[name] = value if has_value else words.pop(0)
        else:
            rest.append(word)
    return found, rest


def _take_own_flags(
    arguments: Sequence[str], tasks: Mapping[str, Config], default: Config
) -> tuple[list[str], Config]:
    """Apply --task, --recipe and --layout to the default, and leave the other arguments."""
    own, rest = take(arguments, ("--task", "--recipe", "--layout"))
    recipe = own.get("--recipe")
    tables = {} if recipe is None else _read_tables(recipe)
    said = tables.pop("task", default.task)
    task = own.get("--task", said)
    if task not in list(tasks):  # a recipe may say anything, a table, too
        raise ConfigError(f"task must be {' or '.join(tasks)}, not {task!r}")
    default = tasks[task]
    weights = _said_weights(rest, tables)
    if weights is not None:
        default = _begun_with(weights, default)
    if recipe is not None:
        default = _over(recipe, tables, default)
    if "--layout" in own:
        axes: dict[str, Any] = {"data": None} | parse_layout(own["--layout"])
        parallel = dataclasses.replace(default.parallel, **axes)
        default = dataclasses.replace(default, parallel=parallel)
    return rest, default


def _said_weights(arguments: Sequence[str], tables: Mapping[str, Any]) -> str | None:
    """The setting model.weights, before the others are read."""
    section = tables.get("model")
    found = section.get("weights") if isinstance(section, dict) else None
    for number, argument in enumerate(arguments):
        flag, has_value, value = argument.partition("=")
        if flag == "--model.weights":
            found = value if has_value else "".join(arguments[number + 1 : number + 2])
    return found if isinstance(found, str) and found else None


def _begun_with(weights: str, default: Config) -> Config:
    """The default with the model, and the tokenizer, that the weights were made with."""
    from mpmp.checkpoint.huggingface import describe  # needs torch, which --help does not

    found = describe(weights)
    if found is None:
        return default
    model = dataclasses.replace(found.model, seed=default.model.seed)
    data = default.data
    if found.tokenizer is not None:
        data = dataclasses.replace(data, tokenizer=found.tokenizer)
    return dataclasses.replace(default, model=model, data=data)


def _read_tables(path: str) -> dict[str, Any]:
    """The tables of a TOML recipe."""
    try:
        with open(path, "rb") as file:
            text = file.read(_LARGEST_RECIPE + 1)
        if len(text) > _LARGEST_RECIPE:
            raise ConfigError(f"recipe {path} is longer than {_LARGEST_RECIPE} bytes")
        return tomllib.loads(text.decode())
    except OSError as error:
        raise ConfigError(f"recipe {path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # a number of 5000 digits, 1000 brackets
        raise ConfigError(f"recipe {path} is not TOML: {error}") from error


def _over(path: str, tables: dict[str, Any], default: Config) -> Config:
    """A recipe's tables over the default; unknown keys and wrong types are refused by name."""
    sections = _sections(default)
    changed: dict[str, Any] = {}
    for name, values in tables.items():
        _known(name, sections, f"recipe {path} has an unknown section")
        if not isinstance(values, dict):
            raise ConfigError(f"recipe {path}: {name} must be a section, [{name}]")
        keys = {field.name: field for field in dataclasses.fields(sections[name])}
        for key, value in values.items():
            _known(key, keys, f"recipe {path} has an unknown setting in [{name}]:")
            values[key] = _typed(path, f"{name}.{key}", value, str(keys[key].type))
        changed[name] = dataclasses.replace(sections[name], **values)
    return dataclasses.replace(default, **changed)


def _sections(config: Config) -> dict[str, Any]:
    return {name: one for name, one in vars(config).items() if dataclasses.is_dataclass(one)}


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
    near = difflib.get_close_matches(name, [*flags, "task", "recipe", "layout"], n=1)
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
        f"{name}.{field.name}": field
        for name, section in _sections(default).items()
        for field in dataclasses.fields(section)
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
                config=(tyro.conf.UseAppendAction,),  # a flag may be given several times
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
