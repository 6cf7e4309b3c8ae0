"""Every recipe is understood, says how it is used, and is laid out as it says."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness import ROOT
from mpmp.commands import parse
from mpmp.config import TASKS, Config

RECIPES = sorted((ROOT / "recipes").glob("*.toml"))


def read(recipe: Path) -> Config:
    return parse("test", "", Config(), ["--recipe", str(recipe)], TASKS)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_understood(recipe: Path) -> None:
    assert read(recipe) != Config()
    assert f"--recipe recipes/{recipe.name}" in recipe.read_text()


def test_the_default_is_written_out() -> None:
    """recipes/gpt.toml holds the defaults."""
    config = read(ROOT / "recipes" / "gpt.toml")
    assert (config.model, config.optimizer) == (Config().model, Config().optimizer)
    assert config.train.limit_s == Config().train.limit_s
