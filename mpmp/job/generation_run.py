"""The command ``mpmp.generate``: a model, prompts, and their continuations on all ranks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from mpmp import config
from mpmp.checkpoint import huggingface
from mpmp.comm.agreement import on_first
from mpmp.comm.mesh import Mesh
from mpmp.comm.world import start
from mpmp.data.tokens import FileTokenizer, Tokenizer, tokenizer_of
from mpmp.errors import ConfigError
from mpmp.job import loaded, setup
from mpmp.job.beginning import vocabulary_of
from mpmp.job.generation import Generation, Speeds, pipeline_of, stage_of
from mpmp.job.generation_screen import Screen
from mpmp.job.generation_settings import Generate
from mpmp.job.generation_text import Continuation, Ends
from mpmp.job.report import Reporter
from mpmp.models.choice import Choice
from mpmp.parallel.placement import placed_parameters
from mpmp.parallel.tensor import lay_by_columns
from mpmp.programs.partition import partition


def generate(settings: Generate) -> None:
    """Continue the prompts, showing text as it comes, and say how fast that was."""
    world = start(settings.device, settings.comm.timeout_s)
    detail = json.dumps(asdict(settings))
    setup.agree(world, "settings", detail, detail)
    mesh = Mesh.over(world, **settings.axes, settings=settings.comm)
    # No tensor made from here on, the groups' own included, is ever changed outside.
    with torch.inference_mode():
        _generate(settings, mesh)


def _generate(settings: Generate, mesh: Mesh) -> None:
    report = Reporter(mesh.world.rank == 0, every=1)
    trained = loaded.find_together(settings.checkpoint, mesh)
    model, tokenizer = trained.config.model, _tokenizer(settings, trained)
    refuse(trained.config)
    texts = on_first("read the prompts", settings.texts, mesh)
    opening = (
        tokenizer.opening if trained.is_foreign and isinstance(tokenizer, FileTokenizer) else []
    )
    prompts = [
        encoded(number, text, tokenizer, model, opening) for number, text in enumerate(texts)
    ]
    start, stop = partition(len(texts), mesh.data.size)[mesh.replica]
    vocabulary = vocabulary_of(model, tokenizer.vocabulary)
    stage = stage_of(model, vocabulary, mesh, getattr(torch, settings.dtype))
    if -(-(stop - start) // mesh.pipeline.size) == 1:
        lay_by_columns(stage)
    notes = loaded.fill(trained, loaded.weights(placed_parameters(stage)), mesh)
    stage.settle()
    for line in notes:
        report.line(line)
    numbers = _numbers(trained, tokenizer, mesh) if settings.end else frozenset()
    ends = Ends(settings.tokens, model.context, settings.stop, numbers)
    rows = [Continuation(n, prompts[n], tokenizer, ends) for n in range(start, stop)]
    screen = Screen(mesh.world.rank == 0, texts, rows)
    choice = Choice(settings.temperature, settings.top_k, settings.top_p, settings.seed)
    speeds = Generation(pipeline_of(stage, mesh), mesh).run(rows, choice, screen.said)
    _close(settings, mesh, rows, speeds, screen)


def refuse(trained: config.Config) -> None:
    """ConfigError for models that do not continue text."""
    model, why = trained.model, ""
    if model.kind == "bert":
        why = "a bert sees both sides of each word, and does not continue text"
    elif model.experts and model.capacity:
        why = (
            f"with model.capacity {model.capacity} a token's experts depend on the tokens behind "
            "it, which generation does not know yet; train with --model.capacity 0"
        )
    if why:
        raise ConfigError(f"{why}; mpmp.generate takes gpt, llama and mlp")


def encoded(
    number: int, text: str, tokenizer: Tokenizer, model: config.Model, opening: Sequence[int] = ()
) -> list[int]:
    """The tokens of a prompt, ``opening`` in front; ConfigError where none could follow."""
    tokens = [*opening, *(int(one) for one in tokenizer.encode(text))]
    if not tokens and tokenizer.end_of_text is not None:
        tokens = [tokenizer.end_of_text]  # behind which a text begins
    if not tokens:
        raise ConfigError(
            f"prompt {number + 1} is empty, and the tokenizer has no end-of-text token that a "
            "text could begin behind; give some text"
        )
    if len(tokens) >= model.context:
        raise ConfigError(
            f"prompt {number + 1} has {len(tokens)} tokens, and the model's context of "
            f"{model.context} has no room for another; shorten it to {model.context - 1} at most"
        )
    return tokens


def _tokenizer(settings: Generate, trained: loaded.Trained) -> Tokenizer:
    path, model = settings.tokenizer or trained.config.data.tokenizer, trained.config.model
    found = tokenizer_of(path)
    own = trained.is_run or trained.is_step  # which have a tokenizer's file where one was used
    if path is None and not own and model.vocabulary not in (None, found.vocabulary):
        raise ConfigError(
            f"{trained.path} has {model.vocabulary} tokens and no tokenizer.json beside it; give "
            "the tokenizer's file by --tokenizer"
        )
    return found


def _numbers(trained: loaded.Trained, tokenizer: Tokenizer, mesh: Mesh) -> frozenset[int]:
    """The tokens that end a text, by the tokenizer and by a Hugging Face folder."""
    found = set() if tokenizer.end_of_text is None else {tokenizer.end_of_text}
    if trained.is_foreign:
        path = trained.path
        found |= {*on_first(f"read {path}", lambda: huggingface.ends_of_text(path), mesh)}
    return frozenset(found)


# --- what is shown at the end ---------------------------------------------------------------------


def _close(
    settings: Generate, mesh: Mesh, rows: Sequence[Continuation], speeds: Speeds, screen: Screen
) -> None:
    """Show what the other replicas have made, and how fast all were; rank 0 of each tells."""
    own: dict[str, Any] = {"rows": [], "speeds": asdict(speeds)}
    if mesh.model.rank == 0:
        own["rows"] = [
            {"number": row.number, "text": row.text, "tokens": row.tokens, "ended": row.ended}
            for row in rows
        ]
    told = [json.loads(text) for text in mesh.world.gather_texts(json.dumps(own))]
    told = [one for one in told if one["rows"]]
    for said in told[1:]:
        for row in said["rows"]:
            screen.show(row["number"], row["text"])
    made = [row for said in told for row in said["rows"]]
    replicas = [Speeds(**one["speeds"]) for one in told]
    figures = {
        "prompt_tokens": sum(one.prompt_tokens for one in replicas),
        "prompt_s": max(one.prompt_s for one in replicas),
        "new_tokens": sum(one.new_tokens for one in replicas),
        "new_s": max(one.new_s for one in replicas),
    }
    report = Reporter(mesh.world.rank == 0, every=1)
    for row in made:
        report.line(f"prompt {row['number'] + 1}: {len(row['tokens'])} tokens, {row['ended']}")
    report.line(
        f"{mesh.layout}: prompts {_speed(figures, 'prompt')}, behind them {_speed(figures, 'new')}"
    )
    if settings.json is not None:
        text = json.dumps({"layout": mesh.layout, **figures, "continuations": made}, indent=1)
        on_first(f"write {settings.json}", lambda: _write(settings.json, text + "\n"), mesh)


def _speed(figures: dict[str, Any], what: str) -> str:
    tokens, seconds = figures[f"{what}_tokens"], figures[f"{what}_s"]
    return f"{tokens:,} tokens in {seconds:.2f} s ({tokens / seconds if seconds else 0:,.0f}/s)"


def _write(path: str | None, text: str) -> None:
    assert path is not None
    Path(path).write_text(text, encoding="utf-8")
