"""``python -m mpmp.checkpoint export DIR --to FOLDER``."""

from __future__ import annotations

from dataclasses import dataclass

from mpmp.checkpoint.huggingface.writing import export_folder
from mpmp.errors import ConfigError


@dataclass(frozen=True)
class Export:
    """Write a model as a Hugging Face folder, which transformers loads.

    GPT-2, LLaMA and BERT: config.json, safetensors and, where there is one, the tokenizer. Of a run
    the newest step is taken; needs memory for one file of the result.
    """

    folder: str = ""
    """Folder of a run, or of one step; or a merged model.safetensors."""
    to: str | None = None
    """The new folder."""
    shard_gb: float = 5.0
    """Size at which a file is full and the next one begins, in GB."""


def export(asked: Export) -> None:
    """Write the folder and tell its files."""
    if not asked.to:
        raise ConfigError("export needs --to, the new folder")
    if not asked.shard_gb > 0:
        raise ConfigError(f"--shard-gb must be positive, not {asked.shard_gb}")
    paths = export_folder(asked.folder, asked.to, int(asked.shard_gb * 1e9))
    size = sum(path.stat().st_size for path in paths)
    names = ", ".join(path.name for path in paths)
    print(f"exported {asked.folder} to {asked.to}: {names} ({size / 1e6:,.2f} MB)")
