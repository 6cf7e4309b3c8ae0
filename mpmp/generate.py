"""Continue text with a trained model: ``mpirun -n N python -m mpmp.generate --checkpoint DIR``.

DIR is the folder of a run, one of its steps, a merged model.safetensors or a Hugging Face folder.
Text is shown as it comes; several prompts are worked on together and shown one after the other.
What is drawn does not depend on the ranks: --layout tp2.pp2 says the same as one process.

    mpirun -n 2 python -m mpmp.generate --checkpoint runs/a --layout tp2 --prompt "def main("
    python -m mpmp.generate --checkpoint gpt2 --prompts prompts.txt --temperature 0 --tokens 50
"""

from __future__ import annotations

import sys

from mpmp import commands
from mpmp.errors import ConfigError
from mpmp.job.generation_settings import Generate


def main() -> None:
    """Parse the command line, then generate; MPI is imported only in between."""
    with commands.guarded():
        settings = commands.cli(Generate, "mpmp.generate", __doc__ or "", sys.argv[1:], Generate())
        if not settings.checkpoint:
            raise ConfigError("mpmp.generate needs --checkpoint DIR; see --help")
        if not settings.prompt and settings.prompts is None:
            raise ConfigError("nothing to continue; give --prompt TEXT or --prompts FILE")
        from mpmp.comm import ending
        from mpmp.job.generation_run import generate

    ending.run(lambda: generate(settings))


if __name__ == "__main__":
    main()
