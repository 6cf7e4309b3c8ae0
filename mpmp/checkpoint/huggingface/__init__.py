"""Models that transformers reads and writes: GPT-2, LLaMA and BERT as Hugging Face folders.

    described = describe(folder)                       settings, before anything is built
    notes = load_folder(folder, wants, mesh, model)    weights, into any layout
    export_folder(source, target, shard_bytes)         a folder that transformers loads

``transformers`` itself is not needed.
"""

from mpmp.checkpoint.huggingface.files import copy_tokenizer, describe, ends_of_text
from mpmp.checkpoint.huggingface.reading import load_folder
from mpmp.checkpoint.huggingface.writing import export_folder
from mpmp.checkpoint.merged import Described

__all__ = [
    "Described",
    "copy_tokenizer",
    "describe",
    "ends_of_text",
    "export_folder",
    "load_folder",
]
