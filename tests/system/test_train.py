"""train: one loss in every layout, resume to the bit, metrics, and what is left at the end."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from shlex import split
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from harness import Run, run_ranks
from system.small import HOME, PLANTED, SMALL, alone, ended, events, plant_text

# As typed by hand: all factorisations of 4 into data x pipeline x tensor.
LAYOUTS_OF_4 = [
    "",
    "--parallel.tensor 2",
    "--parallel.tensor 4",
    "--parallel.pipeline 2",
    "--parallel.pipeline 4",
    "--parallel.pipeline 2 --parallel.tensor 2",
    "--layout dp2.cp2.zero1",
    "--layout dp2.tp2.zero3.sp",
    "--layout pp2.cp2 --parallel.schedule zb_v",
]


def train(n: int, *args: str, cwd: Path, timeout: float = 120, **env: str) -> Run:
    return run_ranks(n, ["-m", "mpmp.train", *args], cwd=cwd, env={**HOME, **env}, timeout=timeout)


def several(n: int, lines: list[list[str]], cwd: Path, timeout: float = 120) -> Run:
    """Trainings one after the other in one job; see planted/several.py."""
    words = [word for line in lines for word in ["/", *line]][1:]
    run = run_ranks(n, [PLANTED / "several.py", *words], cwd=cwd, env=HOME, timeout=timeout)
    assert run.rc == 0 and run.left_behind == 0 and run.stderr == "", run.text
    return run


def same_losses(folders: list[Path]) -> None:
    losses = [[one["loss"] for one in events(folder, "step")] for folder in folders]
    for folder, other in zip(folders, losses, strict=True):
        assert other == pytest.approx(losses[0], rel=1e-5), f"{folder}: {other} not {losses[0]}"


def close_models(folders: list[Path]) -> None:
    models = [load_file(folder / "model.safetensors") for folder in folders]
    for model in models[1:]:
        assert model.keys() == models[0].keys()
        for name, tensor in model.items():
            torch.testing.assert_close(tensor, models[0][name], rtol=1e-3, atol=2e-4, msg=name)


def whole_metrics(folder: Path, first: int, steps: int) -> None:
    """One start, each step once and in order, a validation, a done, all numbers finite."""
    kinds = [one["event"] for one in events(folder)]
    assert kinds[0] == "start" and kinds[-1] == "done" and "validation" in kinds, kinds
    assert [one["step"] for one in events(folder, "step")] == list(range(first, steps + 1))
    for one in events(folder, "step"):
        numbers = [value for value in one.values() if isinstance(value, float)]
        assert len(numbers) >= 6 and all(map(math.isfinite, numbers)), one
        assert 0 <= one["communication"] <= 1 and 0 <= one["bubble"] <= 1, one


# --- must show 2 ----------------------------------------------------------------------------------


@pytest.mark.slow  # test_layouts.py compares some of them over more steps
def test_every_layout_of_4_has_the_same_loss(tmp_path: Path) -> None:
    plant_text(tmp_path)
    folders = [tmp_path / f"run{number}" for number in range(len(LAYOUTS_OF_4))]
    common = [*SMALL, "--train.steps", "20", "--train.sample_tokens", "8", "--checkpoint.dir"]
    run = several(
        4,
        [
            [*layout.split(), *common, str(folder)]
            for layout, folder in zip(LAYOUTS_OF_4, folders, strict=True)
        ],
        tmp_path,
    )
    same_losses(folders)
    close_models(folders)
    starts = [events(folder, "start")[0] for folder in folders]
    assert len({one["layout"] for one in starts}) == len(LAYOUTS_OF_4), starts
    assert len({one["weights_sha256"] for one in starts}) == 1, starts
    for folder in folders:
        whole_metrics(folder, 1, 20)
        assert not list(folder.rglob("*.tmp")), folder
    bits = [events(folder, "validation")[-1]["bits_per_byte"] for folder in folders]
    assert bits == pytest.approx([bits[0]] * len(bits), rel=1e-5), bits
    # What a person sees, once a training.
    for words in (
        "\nsample:\n",
        "load balance L",
        "peak MB",
        "bits per byte (unigram",
        "step 20/20",
    ):
        assert run.stdout.count(words) == len(LAYOUTS_OF_4), f"{words}\n{run.text}"
    texts = {part.partition("\n\n")[0] for part in run.stdout.split("\nsample:\n")[1:]}
    assert len(texts) == 1 and "    def " in texts.pop(), run.text


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_layout_of_4_typed_by_hand(tmp_path: Path) -> None:
    """The default model on the default text."""
    folders = []
    for number, layout in enumerate(LAYOUTS_OF_4):
        folders.append(tmp_path / f"run{number}")
        common = split("--train.steps 20 --train.eval_batches 1 --train.sample_tokens 20")
        run = train(4, *layout.split(), *common, "--checkpoint.dir", str(folders[-1]), cwd=tmp_path)
        assert run.rc == 0 and run.left_behind == 0 and run.stderr == "", run.text
        whole_metrics(folders[-1], 1, 20)
    same_losses(folders)


# --- resume ---------------------------------------------------------------------------------------


def resumed(n: int, layout: str, folder: Path) -> None:
    """10 steps in one go, and 7 of them, a fault, and the rest from the checkpoint of step 5."""
    plant_text(folder)
    args = [*layout.split(), *SMALL, *split("--train.steps 10 --model.dropout 0.1")]
    # At once: a save in the background need not be done when the fault strikes.
    args += split("--checkpoint.every 5 --checkpoint.no-background --checkpoint.dir")
    whole = train(n, *args, "whole", cwd=folder)
    assert whole.rc == 0, whole.text
    broken = train(n, *args, "broken", cwd=folder, MPMP_FAULT="raise:rank=0:step=7")
    ended(broken, 1, "MPMP_FAULT")
    assert [one["step"] for one in events(folder / "broken", "step")] == [1, 2, 3, 4, 5, 6, 7]
    rest = train(n, *args, "broken", "--checkpoint.resume", cwd=folder)
    assert rest.rc == 0 and "resumed from broken/step_00000005 after step 5" in rest.stdout, (
        rest.text
    )
    models = [(folder / name / "model.safetensors").read_bytes() for name in ("whole", "broken")]
    hashes = [hashlib.sha256(model).hexdigest() for model in models]
    assert hashes[0] == hashes[1], (whole.text, rest.text)
    steps: list[dict[str, Any]] = [
        {
            one["step"]: (one["loss"], one["norm"], one["learning_rate"])
            for one in events(path, "step")
        }
        for path in (folder / "whole", folder / "broken")
    ]
    assert steps[0] == steps[1] and len(events(folder / "broken", "step")) == 10, steps


def test_resume_is_exact_to_the_bit(tmp_path: Path) -> None:
    resumed(2, "--parallel.pipeline 2", tmp_path)
    # The folder is used now: a fresh run is refused. Another layout goes on.
    again = [*SMALL, "--train.steps", "10", "--checkpoint.dir", "broken"]
    ended(alone(["-m", "mpmp.train", *again], tmp_path), 2, "--checkpoint.resume")
    assert len(events(tmp_path / "broken", "step")) == 10
    more = split("--checkpoint.resume --layout tp2 --train.steps 12 --model.dropout 0.1")
    other = train(2, *again, *more, cwd=tmp_path)
    assert other.rc == 0 and "changed since: parallel.pipeline from 2 to 1" in other.stdout, (
        other.text
    )
    whole_metrics(tmp_path / "broken", 1, 12)


@pytest.mark.slow
def test_resume_is_exact_where_states_and_experts_are_shared_out(tmp_path: Path) -> None:
    resumed(2, "--layout dp2.ep2.zero2 --model.experts 4", tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("layout", LAYOUTS_OF_4)
def test_resume_is_exact_in_every_layout_of_4(layout: str, tmp_path: Path) -> None:
    resumed(4, layout, tmp_path)


@pytest.mark.slow
def test_a_finished_run_goes_on_with_nothing_to_do(tmp_path: Path) -> None:
    plant_text(tmp_path)
    args = ["-m", "mpmp.train", *SMALL, "--train.steps", "3", "--checkpoint.dir", "run"]
    first = alone(args, tmp_path)
    assert first.rc == 0, first.text
    model = (tmp_path / "run" / "model.safetensors").read_bytes()
    again = alone([*args, "--checkpoint.resume"], tmp_path)
    assert again.rc == 0 and again.stderr == "", again.text
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == model
    more = alone([*args, "--checkpoint.resume", "--train.steps", "5"], tmp_path)
    assert more.rc == 0, more.text
    whole_metrics(tmp_path / "run", 1, 5)


# --- settings that change what is learnt and for how long -----------------------------------------


def tokenizer_file(path: Path, text: str) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=401, special_tokens=["<unk>", "<|endoftext|>"]
    )
    made.train_from_iterator([text], trainer)
    made.save(str(path))


def test_precision_data_tokenizer_and_minutes(tmp_path: Path) -> None:
    """On 2 tensor ranks, in one job; in paths with spaces and other alphabets."""
    text = plant_text(tmp_path).read_text()
    tokenizer_file(tmp_path / "tokens.json", text)
    folder = tmp_path / "текст и 文字"
    folder.mkdir()
    for number in range(20):
        (folder / f"часть {number}.md").write_text(text[number * 2500 : (number + 1) * 2500])
    cases = {
        "bfloat16": "--train.dtype bfloat16 --train.steps 20",
        "float64": "--train.dtype float64 --train.steps 20 --train.eval_every 7",
        "tokens": "--data.tokenizer tokens.json --train.steps 20 --train.sample_tokens 5",
        "minutes": "--train.minutes 0.05",
        "мой прогон 1": "--train.steps 5 --model.dropout 0.2 --model.no_tied",
    }
    lines = [
        ["--parallel.tensor", "2", *SMALL, *args.split(), "--checkpoint.dir", name]
        for name, args in cases.items()
    ]
    lines[-1] += ["--data.path", folder.name]
    run = several(2, lines, tmp_path)
    found = {name: events(tmp_path / name) for name in cases}
    losses = {
        name: [one["loss"] for one in all_ if one["event"] == "step"]
        for name, all_ in found.items()
    }
    for name in ("bfloat16", "float64", "tokens"):
        assert len(losses[name]) == 20 and losses[name][-1] < losses[name][0] - 0.15, losses[name]
    assert losses["bfloat16"] == pytest.approx(losses["float64"], rel=0.02)
    assert losses["bfloat16"] != losses["float64"]
    validations = [one["step"] for one in found["float64"] if one["event"] == "validation"]
    assert validations == [7, 14, 20]
    assert losses["tokens"][0] == pytest.approx(math.log(401), rel=0.03)
    model = load_file(tmp_path / "tokens" / "model.safetensors")
    assert model["embedding.weight"].shape == (401, 32)
    whole_metrics(tmp_path / "minutes", 1, len(losses["minutes"]))
    took = [one for one in found["minutes"] if one["event"] == "step"][-1]["elapsed_s"]
    assert 3 <= took < 10, f"a budget of 3 s, {took} s\n{run.text}"
    assert len(losses["мой прогон 1"]) == 5
    assert "output.weight" in load_file(tmp_path / "мой прогон 1" / "model.safetensors")
    for one in found["bfloat16"]:
        assert json.loads(json.dumps(one)) == one


def test_a_loss_that_is_not_finite_ends_the_job_on_all_ranks(tmp_path: Path) -> None:
    plant_text(tmp_path)
    run = train(
        2,
        *SMALL,
        *split("--train.steps 50 --optimizer.learning_rate 1e30 --optimizer.clip 0"),
        cwd=tmp_path,
    )
    ended(run, 77, "step 1: the loss is", "--optimizer.learning")
