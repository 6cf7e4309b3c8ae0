"""Hugging Face folders into any layout: transformers' logits, every byte, one error on all."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mpmp import models
from mpmp.checkpoint import huggingface
from mpmp.checkpoint.held import Held
from mpmp.checkpoint.huggingface import reading
from mpmp.checkpoint.huggingface.settings import understood
from mpmp.comm.agreement import on_first
from mpmp.comm.mesh import Mesh
from mpmp.errors import ConfigError, MpmpError
from mpmp.models.llama_reference import ReferenceLLaMA
from mpmp.parallel import zero
from mpmp.parallel.merge import merge
from mpmp.parallel.pipeline import Pipeline
from mpmp.parallel.placement import placed_parameters
from mpmp.parallel.stage import Microbatch, Part
from mpmp.programs import schedules
from mpmp.programs.partition import partition
from ranks import hf_models
from ranks.hf_models import CASES, LENGTHS, TIME

LONG = ("gpt2-untied", "llama", "llama-tied")
SOME = [pytest.param(one, marks=pytest.mark.slow if one in LONG else ()) for one in CASES]


@pytest.fixture
def folder(tmp_path, world):
    """One folder for all ranks."""
    return Path(world.gather_texts(str(tmp_path))[0])


def written(folder, case, mesh):
    """A case's folder, written by rank 0."""
    on_first("write a model", lambda: hf_models.write(folder / case, case), mesh)
    return str(folder / case)


def build(path, mesh, dtype, **changes):
    """The model of a folder on this rank, its pieces, and what was said while they were loaded."""
    described = huggingface.describe(path)
    model = replace(described.model, dropout=0.0, **changes)
    stages, number = mesh.pipeline.size, mesh.pipeline.rank
    part = Part(
        number,
        stages,
        partition(model.layers, stages)[number],
        (0, stages - 1) if stages > 1 else (),
    )
    stage = models.build(
        model, model.vocabulary, mesh, dtype, part, tags=len(described.tags), transient=zeroed(mesh)
    )
    sharded = zero.make([stage], mesh, 3 if zeroed(mesh) else 0, 1e6)
    wants = [
        Held.of("weight", one.placement, one.parameter.detach(), one.start, one.stop)
        for one in sharded.pieces()
    ]
    notes = huggingface.load_folder(path, wants, mesh, model)
    sharded.step_done()
    return stage, sharded, notes


def zeroed(mesh):
    return "zero3" in mesh.layout


def ours(stage, mesh, case):
    """Logits on the ranks that have them."""
    microbatch = Microbatch(
        hf_models.tokens(),
        hf_models.tokens(),
        None,
        torch.arange(TIME),
        TIME,
        LENGTHS if case.startswith("bert") else None,
    )
    with torch.no_grad():
        hidden = Pipeline(mesh, [stage], schedules.find("1f1b"), nullcontext).hidden(microbatch)
        return None if hidden is None else stage.logits(hidden, microbatch)


def error(found, expected, case):
    """Largest difference over the largest logit, of tokens that are no padding."""
    if case.startswith("bert"):
        real = torch.arange(TIME) < LENGTHS[:, None]
        found, expected = found[real], expected[real]
    return float((found - expected).abs().max() / expected.abs().max())


# --- as transformers computes ---------------------------------------------------------------------


@pytest.mark.skipif(find_spec("transformers") is None, reason="the oracle is not installed")
@pytest.mark.ranks(2)
@pytest.mark.parametrize("case", SOME)
def test_logits_are_those_of_transformers(world, folder, case):
    meshes = [Mesh.over(world, tensor=world.size), Mesh.over(world, pipeline=world.size)]
    path = written(folder, case, meshes[0])
    expected = load_file(f"{path}/expected.st")
    errors = {}
    for mesh in meshes:
        for dtype in (torch.float32, torch.float64):
            stage, sharded, notes = build(path, mesh, dtype)
            assert notes == ()
            found, name = ours(stage, mesh, case), str(dtype).removeprefix("torch.")
            if found is not None:
                errors[mesh.layout, name] = error(found, expected[name], case)
            if case.startswith("llama") and dtype is torch.float64:
                merged = merge(sharded.weights(), mesh)
                if merged and found is not None:
                    errors["reference"] = error(found, of_reference(path, merged), case)
    limits = {"float32": 1e-5, "float64": 1e-6 if case.startswith("llama") else 1e-12}
    for key, one in errors.items():
        assert one <= (1e-12 if key == "reference" else limits[key[1]]), (key, one)


def of_reference(path, merged):
    """Logits of our own plain LLaMA, which turns positions in float64."""
    model = huggingface.describe(path).model
    plain = ReferenceLLaMA(
        model.layers,
        model.heads,
        model.num_kv_heads,
        model.width,
        model.num_hidden,
        model.vocabulary,
        model.tied,
        eps=model.norm_eps,
        base=model.rope_base,
    ).double()
    plain.load(merged)
    with torch.no_grad():
        return plain(hf_models.tokens())


# --- any layout -----------------------------------------------------------------------------------


def layouts(world):
    """Of 2 ranks each axis alone, of 4 combined."""
    if world.size == 2:
        yield Mesh.over(world, tensor=2)
        yield Mesh.over(world, pipeline=2)
        yield Mesh.over(world, data=2, zero=3)
    else:
        yield Mesh.over(world, pipeline=2, tensor=2)
        yield Mesh.over(world, data=2, tensor=2, zero=3)


@pytest.mark.ranks(2, 4)
def test_every_layout_gets_every_byte(world, folder, monkeypatch):
    """Also turned and stacked ones, cut and shared out, and no byte of a file is read twice."""
    tensors = {}
    on_first(
        "write",
        lambda: tensors.update(hf_models.write_gpt2(folder / "m", torch.bfloat16, shards=3)),
        Mesh.over(world, tensor=world.size),
    )
    read_bytes = []
    original = reading.read
    monkeypatch.setattr(reading, "read", lambda *a: read_bytes.append(original(*a)))
    size = sum(one.stat().st_size for one in (folder / "m").glob("*.safetensors"))
    for mesh in layouts(world):
        read_bytes.clear()
        _, sharded, notes = build(str(folder / "m"), mesh, torch.float32)
        assert notes == ()
        total = int(mesh.everyone.allreduce(torch.tensor([sum(read_bytes)])))
        merged = merge(sharded.weights(), mesh)
        assert total <= size
        if world.rank == 0:
            expected = hf_models.gpt2_as_ours(tensors)
            assert merged.keys() == expected.keys()
            for name, one in expected.items():
                assert torch.equal(merged[name], one.float()), name


# --- what is wrong --------------------------------------------------------------------------------

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def change_tensors(change):
    def damage(path):
        tensors = load_file(path / WEIGHTS)
        change(tensors)
        save_file(tensors, path / WEIGHTS)

    return damage


def change_json(name, change):
    def damage(path):
        said = json.loads((path / name).read_text())
        change(said)
        (path / name).write_text(json.dumps(said))

    return damage


def move(tensors, old, new):
    tensors[new] = tensors.pop(old)


def cut_off(path):
    data = (path / WEIGHTS).read_bytes()
    (path / WEIGHTS).write_bytes(data[:-8])


LN, WTE = "transformer.ln_f.weight", "transformer.wte.weight"
SHARD = "model-00002-of-00003.safetensors"
WRONG = {
    "no folder": (lambda path: shutil.rmtree(path), 74, "neither a folder nor"),
    "no config": (lambda path: (path / "config.json").unlink(), 78, "has no config.json"),
    "config": (lambda path: (path / "config.json").write_text("{"), 78, "config.json that is not"),
    "architecture": (
        change_json("config.json", lambda one: one.update(architectures=["T5Model"])),
        2,
        "'T5Model'",
    ),
    "no weights": (lambda path: (path / WEIGHTS).unlink(), 78, "so there are no weights"),
    "pickle": (
        lambda path: (path / WEIGHTS).rename(path / "pytorch_model.bin"),
        78,
        "pytorch_model.bin, a pickle",
    ),
    "truncated": (cut_off, 78, "fill its"),
    "not safetensors": (lambda path: (path / WEIGHTS).write_bytes(b"x" * 99), 78, "header"),
    "missing": (change_tensors(lambda one: one.pop(LN)), 78, f"lacks {LN}"),
    "unknown": (change_tensors(lambda one: one.update(odd=one[LN] + 1)), 78, "has odd, which"),
    "shape": (
        change_tensors(lambda one: one.update({WTE: one[WTE][:-1].clone()})),
        78,
        f"{WTE} of shape (36, 16) where the model has (37, 16)",
    ),
    "integers": (change_tensors(lambda one: one.update({LN: one[LN].int()})), 78, "int32"),
    "layers": (
        change_json("config.json", lambda one: one.update(n_layer=4)),
        78,
        "lacks transformer.h.3.attn.c_attn.bias",
    ),
    "no shard": (lambda path: (path / SHARD).unlink(), 78, f"lacks the shard {SHARD}"),
    "index": (change_json(INDEX, lambda one: one.pop("weight_map")), 78, "without a weight_map"),
    "index out": (
        change_json(INDEX, lambda one: one["weight_map"].update({LN: "../x"})),
        78,
        "is no name of a file",
    ),
    "index elsewhere": (
        change_json(INDEX, lambda one: one["weight_map"].update({LN: SHARD})),
        78,
        f"index by which {LN} lies in {SHARD}",
    ),
    "index beyond": (
        change_json(INDEX, lambda one: one["weight_map"].update(odd=SHARD)),
        78,
        "is in none of the files",
    ),
    "index short": (
        change_json(INDEX, lambda one: one["weight_map"].pop(LN)),
        78,
        f"{LN}, which its index does not name",
    ),
}


@pytest.mark.ranks(2)
def test_what_is_wrong_is_named_on_all_ranks_alike(world, folder):
    mesh = Mesh.over(world, tensor=world.size)
    for name, (damage, code, words) in WRONG.items():
        path = folder / name
        shards = 3 if name.startswith(("index", "no shard")) else 1
        on_first("write", lambda: _damaged(path, shards, damage), mesh)  # noqa: B023
        described = understood(hf_models.gpt2_config(), str(path))
        if name == "layers":
            described = replace(described, model=replace(described.model, layers=4))
        with pytest.raises(MpmpError) as caught:
            load(str(path), mesh, described.model)
        said = str(caught.value)
        assert words in said and "\n" not in said, (name, said)
        assert (caught.value.exit_code, name) == (code, name)
        assert len(set(world.gather_texts(said))) == 1


def _damaged(path, shards, damage):
    hf_models.write_gpt2(path, shards=shards)
    damage(path)


@pytest.mark.ranks(2)
def test_settings_that_contradict_are_refused_with_both_values(world, folder):
    mesh = Mesh.over(world, tensor=world.size)
    path = folder / "m"
    on_first("write", lambda: _damaged(path, 1, lambda _: None), mesh)
    model = understood(hf_models.gpt2_config(), str(path)).model
    for change, words in [
        ({"layers": 2}, "model.layers is 2 in this run and 3 in"),
        ({"tied": False}, "model.tied is False in this run and True in"),
        ({"norm_eps": 1e-6}, "model.norm_eps is 1e-06 in this run and 1e-05 in"),
        ({"context": 10}, "model.context 10 is more than the 9 tokens"),
    ]:
        with pytest.raises(ConfigError) as caught:
            load(str(path), mesh, replace(model, **change))
        assert words in str(caught.value)
    stage = load(str(path), mesh, replace(model, context=4, dropout=0.3))
    position = load_file(path / WEIGHTS)["transformer.wpe.weight"]
    assert torch.equal(stage.embedding.position, position[:4])


def load(path, mesh, model):
    """A model of these settings with a folder's weights."""
    part = Part(0, 1, (0, model.layers))
    stage = models.build(model, model.vocabulary, mesh, torch.float32, part)
    wants = [Held.of("weight", place, one.detach()) for place, one in placed_parameters(stage)]
    huggingface.load_folder(path, wants, mesh, model)
    return stage
