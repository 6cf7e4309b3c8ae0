"""A Hugging Face folder on the command line: begun from, trained, exported, refused."""

from __future__ import annotations

from pathlib import Path
from shlex import split

import pytest
import torch
from safetensors.torch import load_file

from harness import run_ranks
from mpmp.checkpoint.huggingface import export_folder
from mpmp.parallel.merge import digest
from ranks import hf_models
from system.small import HOME, alone, ended, events, plant_text

SHORT = split(
    "--data.path text.txt --train.batch 4 --train.steps 2 --train.sample_tokens 0 "
    "--train.eval_batches 1 --checkpoint.dir run"
)


def train(n: int, *args: str, cwd: Path):
    return run_ranks(n, ["-m", "mpmp.train", *SHORT, *args], cwd=cwd, env=HOME, timeout=120)


@pytest.fixture
def here(tmp_path):
    plant_text(tmp_path)
    return tmp_path


def test_a_run_begins_from_a_folder_and_becomes_one(here):
    tensors = hf_models.write_gpt2(here / "gpt2", vocabulary=300)
    run = train(2, "--layout", "tp2", "--model.weights", "gpt2", cwd=here)
    assert run.rc == 0 and "begins with the weights of gpt2" in run.stdout, run.text
    start = events(here / "run", "start")[0]
    assert start["weights_sha256"] == digest(hf_models.gpt2_as_ours(tensors))
    done = alone(["-m", "mpmp.checkpoint", "export", "run", "--to", "a"], here)
    assert done.rc == 0 and "config.json, model.safetensors" in done.stdout, done.text
    export_folder(str(here / "run/step_00000002"), str(here / "b"), 1 << 40)
    export_folder(str(here / "run/model.safetensors"), str(here / "c"), 1 << 40)
    written = [load_file(here / out / "model.safetensors") for out in "abc"]
    assert {name: one.shape for name, one in written[0].items()} == {
        name: one.shape for name, one in tensors.items()
    }
    for name, one in tensors.items():
        assert not torch.equal(one, written[0][name])  # two steps have changed it
        assert all(torch.equal(written[0][name], other[name]) for other in written)


def test_mistakes_end_with_one_line(here):
    hf_models.write_gpt2(here / "gpt2", vocabulary=300)
    run = train(2, "--layout", "pp2", "--model.weights=gpt2", "--model.layers=2", cwd=here)
    ended(run, 2, "model.layers is 2 in this run and 3 in gpt2")
    (here / "gpt2/config.json").unlink()
    run = train(2, "--model.weights=gpt2", cwd=here)
    assert run.rc == 78 and run.text.count("gpt2 has no config.json") == 1, run.text
