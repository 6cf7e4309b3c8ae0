"""Score a trained model on a text: ``mpirun -n N python -m mpmp.evaluate --checkpoint DIR``.

DIR is the folder of a run, one of its steps, a merged model.safetensors or a Hugging Face folder.
Shown are the loss in nats per token, the perplexity and bits per byte of the validation split (of
a BERT the loss of masked words); --json FILE writes them down, too. Settings are those of the run
unless flags say otherwise: --data.path takes another text, --train.eval-batches more of it, and
--layout any layout that can train.
"""

from __future__ import annotations

import sys

from mpmp import commands
from mpmp.config import Config
from mpmp.errors import ConfigError

_OWN = ("--checkpoint", "--json")


def main() -> None:
    """Parse the command line, then evaluate; MPI is imported only in between."""
    with commands.guarded():
        own, arguments = _take_own(sys.argv[1:])
        from mpmp.job import loaded

        given = own.get("--checkpoint", "")
        default = loaded.settings_of(given) if given else Config()
    config = commands.parse("mpmp.evaluate", __doc__ or "", default, arguments)
    with commands.guarded():
        if not given:
            raise ConfigError("mpmp.evaluate needs --checkpoint DIR; see --help")
        from mpmp.comm import ending
        from mpmp.job.evaluation import Asked, evaluate

    ending.run(lambda: evaluate(config, Asked(given, own.get("--json"))))


def _take_own(arguments: list[str]) -> tuple[dict[str, str], list[str]]:
    """The flags that only this command has, and the other arguments."""
    own: dict[str, str] = {}
    rest: list[str] = []
    words = [part for one in arguments for part in _parted(one)]
    while words:
        word = words.pop(0)
        if word not in _OWN:
            rest.append(word)
        elif not words:
            raise ConfigError(f"{word} needs a value")
        else:
            own[word] = words.pop(0)
    return own, rest


def _parted(argument: str) -> list[str]:
    flag, has_value, value = argument.partition("=")
    return [flag, value] if has_value and flag in _OWN else [argument]


if __name__ == "__main__":
    main()
