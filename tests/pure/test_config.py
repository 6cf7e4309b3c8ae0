"""Settings: every range, every layout string, and one hash for equal configurations."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpmp import config
from mpmp.config import Config, config_hash, layout_name, parse_layout, to_dict
from mpmp.errors import ConfigError

SECTIONS = {
    one.name: one.default_factory  # type: ignore[misc]
    for one in dataclasses.fields(Config)
    if one.default_factory is not dataclasses.MISSING  # type: ignore[misc]
}
NUMBERS = [
    (section, one.name, str(one.type))
    for section, make in SECTIONS.items()
    for one in dataclasses.fields(make)  # type: ignore[arg-type]
    if str(one.type).split(" | ")[0] in ("int", "float")
]
ANY_SIGN = {("model", "seed"), ("data", "seed")}
ZERO_MEANS_SOMETHING = ANY_SIGN | {
    ("model", "dropout"),
    ("model", "experts"),
    ("model", "capacity"),
    ("model", "balance"),
    ("optimizer", "final_fraction"),
    ("optimizer", "warmup_steps"),
    ("optimizer", "weight_decay"),
    ("optimizer", "beta1"),
    ("optimizer", "beta2"),
    ("optimizer", "clip"),
    ("train", "eval_every"),
    ("train", "sample_tokens"),
    ("checkpoint", "every"),
}


def make(section: str, name: str, value: object) -> None:
    SECTIONS[section](**{name: value})


def refused(section: str, name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"^{section}\.{name} .*") as caught:
        make(section, name, value)
    assert "\n" not in str(caught.value) and str(value) in str(caught.value)


@pytest.mark.parametrize(("section", "name", "kind"), NUMBERS)
def test_no_number_may_be_negative_or_zero_without_meaning(
    section: str, name: str, kind: str
) -> None:
    if (section, name) not in ANY_SIGN:
        refused(section, name, -1 if kind.startswith("int") else -1e-3)
    if (section, name) in ZERO_MEANS_SOMETHING:
        make(section, name, 0)
    else:
        refused(section, name, 0)


FLOATS = [(section, name) for section, name, kind in NUMBERS if kind.startswith("float")]


@pytest.mark.parametrize(("section", "name"), FLOATS)
@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_no_rate_may_be_nan(section: str, name: str, value: float) -> None:
    refused(section, name, value)


@pytest.mark.parametrize(
    ("section", "name"),
    [
        ("model", "dropout"),
        ("optimizer", "learning_rate"),
        ("optimizer", "beta1"),
        ("optimizer", "beta2"),
    ],
)
def test_what_may_not_be_infinite(section: str, name: str) -> None:
    refused(section, name, math.inf)


def test_width_is_a_multiple_of_the_heads() -> None:
    with pytest.raises(ConfigError, match="model.width 100 must be a multiple of model.heads 3"):
        config.Model(width=100, heads=3)


def test_every_setting_has_a_sentence_and_sections_are_frozen() -> None:
    source = Path(config.__file__).read_text()
    for section, make in SECTIONS.items():
        made = make()
        for one in dataclasses.fields(made):
            if one.name not in ("layers", "heads", "beta1", "beta2"):  # what else could they be
                line = source.split(f"\n    {one.name}: ", 1)[1].splitlines()[1]
                assert line.startswith('    """'), f"{section}.{one.name} is not documented"
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(made, one.name, None)


def test_microbatches_are_at_most_the_rows() -> None:
    assert config.Parallel().num_microbatches(1) == 1
    assert config.Parallel(pipeline=4).num_microbatches(100) == 8
    assert config.Parallel(pipeline=4).num_microbatches(3) == 3
    assert config.Parallel(pipeline=4, microbatches=5).num_microbatches(3) == 5


# --- layouts --------------------------------------------------------------------------------------


def test_layouts() -> None:
    rest = {"pipeline": 1, "context": 1, "tensor": 1, "expert": 1, "zero": 0, "sequence": False}
    assert parse_layout("dp2.pp3.tp4") == rest | {"data": 2, "pipeline": 3, "tensor": 4}
    assert parse_layout("tp2") == rest | {"tensor": 2}
    assert parse_layout("tp2.dp1") == rest | {"data": 1, "tensor": 2}
    whole = {"data": 4, "pipeline": 2, "context": 3, "tensor": 2, "expert": 2}
    whole |= {"zero": 1, "sequence": True}
    assert parse_layout("dp4.pp2.cp3.tp2.ep2.zero1.sp") == whole
    assert layout_name(2) == "dp2.pp1.tp1"


@given(*[st.integers(1, 10**6)] * 5, st.integers(0, 3), st.booleans())
def test_a_layout_is_read_as_it_was_written(
    data: int, pipeline: int, context: int, tensor: int, expert: int, zero: int, sequence: bool
) -> None:
    axes = {"data": data, "pipeline": pipeline, "context": context}
    axes |= {"tensor": tensor, "expert": expert}
    assert parse_layout(layout_name(**axes, zero=zero, sequence=sequence)) == {
        **axes,
        "zero": zero,
        "sequence": sequence,
    }


@pytest.mark.parametrize(
    "text",
    ["", "all", "dp", "dp0", "tp-1", "dp2,tp2", "dp2tp2", "dp2..tp2", "dp2.", "dp2.dp2", "xp2"]
    + ["zero", "zero4", "zero1.zero2", "sp2", "sp.sp", "cp", "ep0"]
    + ["DP2", "dp2.5", "dp02", "tp２", "dp2 ", "dp2\n"],
)
def test_a_layout_that_is_not_understood(text: str) -> None:
    with pytest.raises(ConfigError, match="not understood") as caught:
        parse_layout(text)
    assert "\n" not in str(caught.value)


# --- the hash -------------------------------------------------------------------------------------


def test_the_hash_tells_every_setting_apart() -> None:
    base = Config()
    assert config_hash(base) == config_hash(Config())
    hashes = {config_hash(base)}
    changes = 0
    for section in SECTIONS:
        for name, value in to_dict(base)[section].items():
            own = getattr(base, section)
            if isinstance(value, bool):
                change: object = not value
            elif name in ("width", "heads"):
                change = 4 * value
            elif isinstance(value, (int, float)):
                change = value / 2 if isinstance(value, float) else value + 1
            else:
                change = "other" if "str" in str(type(own).__dataclass_fields__[name].type) else 7
            change = {"cut": "measured", "kv_heads": 2, "experts": 4, "top_k": 1}.get(name, change)
            if (section, name) == ("checkpoint", "resume"):
                continue  # needs a folder
            if value == 0.0 and isinstance(value, float):
                change = 0.5
            changes += 1
            other = dataclasses.replace(own, **{name: change})
            hashes.add(config_hash(dataclasses.replace(base, **{section: other})))
    assert len(hashes) == 1 + changes
