"""Look at checkpoints, prove them, hand them on: ``python -m mpmp.checkpoint verify DIR``.

DIR is a run's folder or one step's; ``python -m mpmp.checkpoint VERB --help`` tells the options.
"""

from __future__ import annotations

import dataclasses
import difflib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from mpmp import commands
from mpmp.checkpoint.huggingface.command import Export, export
from mpmp.checkpoint.inspecting import Inspect, inspect
from mpmp.checkpoint.merging import Merge, merge
from mpmp.checkpoint.pruning import Prune, prune
from mpmp.checkpoint.resharding import Reshard, reshard
from mpmp.checkpoint.verifying import Verify, verify
from mpmp.comm import ending
from mpmp.comm.agreement import reason
from mpmp.errors import ConfigError, InputOutputError, LaunchError
from mpmp.launcher import told_rank, told_size

T = TypeVar("T")


@dataclass(frozen=True)
class Verb(Generic[T]):
    """What is asked, a dataclass whose fields are the options, and who does it."""

    asked: type[T]
    work: Callable[[T], None]


VERBS: dict[str, Verb[Any]] = {
    "inspect": Verb(Inspect, inspect),
    "verify": Verb(Verify, verify),
    "merge": Verb(Merge, merge),
    "reshard": Verb(Reshard, reshard),
    "prune": Verb(Prune, prune),
    "export": Verb(Export, export),
}
"""Everything that can be done; a new verb is one more line."""


def main() -> None:
    """Parse the command line, then do it."""
    with commands.guarded():
        name, arguments = _verb(sys.argv[1:])
        verb = VERBS[name]
        folder, options = _take_folder(name, arguments)
        asked = commands.cli(
            verb.asked,
            f"mpmp.checkpoint {name} DIR",
            verb.asked.__doc__ or "",
            options,
            verb.asked(folder=folder),
        )
        if not asked.folder:
            raise ConfigError(
                f"{name} needs the folder of a run or of a step, as in python -m mpmp.checkpoint "
                f"{name} runs/default"
            )
        if told_size() > 1:
            raise LaunchError(
                f"mpmp.checkpoint works in one process and {told_size()} were started; leave "
                "mpirun out"
            )

    def work() -> None:
        try:
            verb.work(asked)
        except OSError as error:
            pruned = "; was the step pruned meanwhile?" if type(error) is FileNotFoundError else ""
            raise InputOutputError(
                f"{name} {asked.folder} failed: {reason(error, '')}{pruned}"
            ) from error

    ending.run(work)


def _verb(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """The verb and its arguments; ends the process where help was asked for."""
    first, rest = (arguments[0], list(arguments[1:])) if arguments else ("", [])
    if first in ("-h", "--help"):
        if told_rank() == 0:
            print(_help())
        sys.exit(0)
    if first not in VERBS:
        raise ConfigError(
            f"mpmp.checkpoint must be told what to do, one of {', '.join(VERBS)}, "
            + (f"not {first!r}{_nearest(first, VERBS)}" if first else "but was told nothing")
            + "; usage: python -m mpmp.checkpoint inspect DIR"
        )
    return first, rest


def _help() -> str:
    width = max(map(len, VERBS))
    lines = [
        f"    {name:{width}}  {(verb.asked.__doc__ or '').splitlines()[0]}"
        for name, verb in VERBS.items()
    ]
    head, *rest = (__doc__ or "").strip().split("\n\n")
    return "\n\n".join([head, "\n".join(lines), *rest])


def _take_folder(verb: str, arguments: Sequence[str]) -> tuple[str, list[str]]:
    """The one word that is no option nor the value of one, and the options."""
    fields = dataclasses.fields(VERBS[verb].asked)
    switches = {_flag(one.name) for one in fields if isinstance(one.default, bool)}
    valued = {_flag(one.name) for one in fields} - switches
    known = {*valued, *switches, *(one.replace("--", "--no-", 1) for one in switches), "--help"}
    words, options, left = list[str](), list[str](), list(arguments)
    while left:
        options.append(left.pop(0))
        flag, has_value, _ = options[-1].partition("=")
        flag = flag.replace("_", "-")
        if not flag.startswith("-"):
            words.append(options.pop())
        elif flag.startswith("--") and flag not in known:
            hint = _nearest(flag, sorted(known)) or f"; known are {', '.join(sorted(known))}"
            raise ConfigError(f"{verb} has no option {flag}{hint}")
        elif flag in valued and not has_value and left:
            options.append(left.pop(0))
    if len(words) > 1:
        raise ConfigError(f"{verb} takes one folder, not {len(words)}: {', '.join(words)}")
    return "".join(words), options


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _nearest(word: str, words: Sequence[str] | dict[str, Any]) -> str:
    near = difflib.get_close_matches(word, words, n=1)
    return f"; did you mean {near[0]}?" if near else ""


if __name__ == "__main__":
    main()
