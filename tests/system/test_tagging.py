"""Entity tagging as a command: what is learnt, in every layout, resumed, reported, refused."""

from __future__ import annotations

import os
import shutil
import statistics
from pathlib import Path
from shlex import split

import pytest
from safetensors.torch import load_file

from harness import Run, run_ranks
from mpmp.data import conll, generated
from mpmp.parallel.counter import key_of
from system.small import HOME, PLANTED, alone, ended, events

pytest.importorskip("tokenizers")

TAGGING = ["-m", "mpmp.train", "--task", "tagging"]
SMALL = split(
    "--model.layers 2 --model.heads 4 --model.width 32 --model.context 32 --train.batch 16 "
    "--data.vocabulary 300 --train.log_every 1 --train.dtype float64"
)
LAYOUTS = {
    2: ["dp2", "tp2", "pp2", "dp2.zero1", "tp2.sp", "cp2", "dp2.zero2", "dp2.zero3"],
    4: [
        *("dp4", "tp4", "pp4", "cp4", "dp2.tp2", "dp2.pp2", "pp2.tp2", "dp2.cp2", "cp2.tp2.sp"),
        *("pp2.cp2", "dp2.tp2.zero1.sp", "dp4.zero2", "dp2.pp2.zero1", "dp4.zero3"),
    ],
}


def plant(folder: Path, train: int = 200, others: int = 40) -> Path:
    """Some of the made-up sentences as CoNLL files."""
    folder.mkdir()
    for name, tagged in generated.generate().items():
        lines = []
        for one in tagged.sentences[: train if name == "train" else others]:
            pairs = zip(one.words, one.tags, strict=True)
            lines += [*(f"{word}\tX\t{tag}" for word, tag in pairs), ""]
        (folder / f"{name}.conll").write_text("\n".join(lines) + "\n")
    return folder


def several(
    n: int, lines: list[list[str]], cwd: Path, timeout: float = 120, threads: str | None = None
) -> Run:
    """Taggings one after the other in one job."""
    words = [word for line in lines for word in ["/", "--task", "tagging", *line]][1:]
    env = HOME | {"OMP_NUM_THREADS": threads}
    run = run_ranks(n, [PLANTED / "several.py", *words], cwd=cwd, env=env, timeout=timeout)
    assert run.rc == 0 and run.left_behind == 0 and run.stderr == "", run.text
    return run


def predictions(folder: Path) -> dict[str, str]:
    names = ("validation.predicted.conll", "test.predicted.conll")
    return {name: (folder / name).read_text() for name in names}


def losses(folder: Path) -> list[float]:
    return [one["loss"] for one in events(folder, "step")]


def scored(path: Path) -> dict[str, dict[str, float]]:
    """What seqeval says of a file of predictions."""
    metrics = pytest.importorskip("seqeval.metrics")
    gold: list[list[str]] = [[]]
    predicted: list[list[str]] = [[]]
    for line in path.read_text().split("\n"):
        if line:
            _, tag, guess = line.split("\t")
            gold[-1].append(tag)
            predicted[-1].append(guess)
        elif gold[-1]:
            gold.append([])
            predicted.append([])
    report = metrics.classification_report(gold, predicted, output_dict=True, zero_division=0)
    assert isinstance(report, dict)
    return report


def same_report(folder: Path) -> None:
    """See that the reports of a run are those of seqeval on its files."""
    reports = events(folder, "report")
    assert [one["split"] for one in reports] == ["validation", "test"]
    for one in reports:
        expected = scored(folder / f"{one['split']}.predicted.conll")
        assert list(one["entities"]) == list(expected)
        for kind, ours in one["entities"].items():
            theirs = [expected[kind][name] for name in ("precision", "recall", "f1-score")]
            assert [ours["precision"], ours["recall"], ours["f1"]] == pytest.approx(theirs, 1e-12)
            assert ours["support"] == expected[kind]["support"]


# --- must show 6 ----------------------------------------------------------------------------------


@pytest.mark.timeout(200)
def test_entities_are_found_and_reported_as_by_seqeval(tmp_path: Path) -> None:
    """With nothing given but the task, in a little more haste than by default."""
    haste = ["--train.epochs", "3", "--optimizer.learning_rate", "2e-3"]
    run = run_ranks(
        2,
        [*TAGGING, *haste, "--checkpoint.dir", "run"],
        cwd=tmp_path,
        env=HOME,
        timeout=180,
    )
    assert run.rc == 0 and run.stderr == "" and run.left_behind == 0, run.text
    folder = tmp_path / "run"
    validations = events(folder, "validation")
    assert [one["step"] for one in validations] == [63, 125, 188]
    for one in (
        validations[-1],
        *(one["entities"]["micro avg"] for one in events(folder, "report")),
    ):
        assert one["f1"] >= 0.9, run.text
    same_report(folder)
    for words in (
        "weighted avg",
        "LOC",
        "entities: precision",
        "load balance L",
        "tokens/s in all",
    ):
        assert words in run.stdout, run.text
    gold = [one.words for one in generated.generate()["test"].sentences]
    written = conll.read(str(folder / "test.predicted.conll"))
    assert [one.words for one in written.sentences] == gold
    assert (folder / "tokenizer.json").is_file()


def compared(data: Path, layouts: dict[int, list[str]], args: list[str]) -> Path:
    """Train in one process and in every layout, and see that all predict alike; the former's run.

    One more run goes on from its last checkpoint but one, on two tensor ranks.
    """
    folder = data.parent
    args = ["--data.path", str(data), *SMALL, "--checkpoint.every", "10", *args]
    whole = folder / "dp1"
    # Two threads that wait for each other's cores take a hundred times as long.
    one_thread = {"OMP_NUM_THREADS": "1"}
    done = alone([*TAGGING, *args, "--checkpoint.dir", str(whole)], folder, one_thread, 600)
    assert done.rc == 0 and done.stderr == "", done.text
    rest = folder / "resumed"
    shutil.copytree(whole, rest)
    shutil.rmtree(max(rest.glob("step_*")))
    for path in rest.glob("*.predicted.conll"):
        path.unlink()
    for ranks, names in layouts.items():
        lines = [
            ["--layout", name, *args, "--checkpoint.dir", str(folder / name)] for name in names
        ]
        if ranks == 2:
            resume = ["--checkpoint.dir", str(rest), "--checkpoint.resume"]
            lines.append(["--layout", "tp2", *args, *resume])
        several(ranks, lines, folder, 60 + 60 * len(lines))
        for name in [*names, "resumed"]:
            assert losses(folder / name) == pytest.approx(losses(whole), rel=1e-9), name
            assert predictions(folder / name) == predictions(whole), name
            same = [(folder / place / "tokenizer.json").read_bytes() for place in (name, "dp1")]
            assert same[0] == same[1], name
    return whole


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_predictions_are_those_of_one_process(tmp_path: Path) -> None:
    """On words that tell their tags, in a context that most sentences do not fit into."""
    said = {"the": "O", "in": "O", "Ann": "B-PER", "Lee": "I-PER", "Rome": "B-LOC", "A&B": "B-ORG"}
    data = tmp_path / "data"
    data.mkdir()
    for name, size in (("train", 80), ("dev", 12), ("test", 17)):
        lines = []
        for number in range(size):
            draws = [key_of(place, f"{name}/{number}") for place in range(4 + number % 17)]
            words = [list(said)[draw % len(said)] for draw in draws]
            tags = conll.in_iob2([said[word] for word in words])
            lines += [*(f"{word}\t{tag}" for word, tag in zip(words, tags, strict=True)), ""]
        (data / f"{name}.conll").write_text("\n".join(lines) + "\n")
    args = split("--train.steps 20 --optimizer.warmup_steps 2 --optimizer.learning_rate 1e-2")
    args += split("--model.context 12 --model.dropout 0.1")
    whole = compared(data, {2: ["dp2", "pp2"], 4: ["dp4", "pp2.tp2"]}, args)
    same_report(whole)
    lines = predictions(whole)["test.predicted.conll"].split("\n")
    tags = {line.split("\t")[-1] for line in lines if line}
    assert len(tags) > 3, f"a model that says little proves little: {tags}"
    # Another tokenizer is another model.
    saved = whole / "tokenizer.json"
    saved.write_text(saved.read_text() + "\n")
    resume = ["--data.path", str(data), *SMALL, *args, "--checkpoint.dir", "dp1"]
    again = alone([*TAGGING, *resume, "--checkpoint.resume"], tmp_path)
    ended(again, 78, "tokenizer_sha256")


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_predictions_of_a_good_model_are_those_of_one_process(tmp_path: Path) -> None:
    """In float64."""
    args = split("--train.epochs 5 --train.log_every 100 --checkpoint.every 300")
    args += split("--model.width 64 --optimizer.learning_rate 2e-3")
    data = plant(tmp_path / "data", 2000)
    whole = compared(data, {2: ["dp2", "tp2", "pp2"], 4: ["dp4"]}, args)
    f1 = events(whole, "validation")[-1]["f1"]
    assert f1 >= 0.9, f"F1 {f1}"


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_wnut_in_every_layout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """MPMP_CONLL names a folder of CoNLL files, WNUT 2017 for instance.

    Tokens/s are those of the median step, pieces of words without padding; a rank has one thread.
    """
    data = os.environ.get("MPMP_CONLL")
    if data is None:
        pytest.skip("optional data: MPMP_CONLL names no folder of CoNLL files")
    cut = tmp_path / "data"
    cut.mkdir()
    for split_name, path in conll.find(data).items():
        sentences = conll.read(path).sentences
        lines = [
            "\n".join(f"{word}\t{tag}" for word, tag in zip(one.words, one.tags, strict=True))
            for one in (sentences if split_name == "train" else sentences[:100])
        ]
        (cut / f"{split_name}.conll").write_text("\n\n".join(lines) + "\n")
    args = ["--data.path", str(cut), "--train.log_every", "100", "--model.layers", "4"]
    args += split("--train.steps 12 --optimizer.learning_rate 5e-4")
    found: dict[str, float] = {}
    rows = []
    for ranks, names in ({1: ["dp1"]} | LAYOUTS).items():
        wanted = [
            ["--layout", name, *args, "--checkpoint.dir", str(tmp_path / name)] for name in names
        ]
        several(ranks, wanted, tmp_path, 1200, threads="1")
        for name in names:
            assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "dp1"), rel=1e-3)
            steps = events(tmp_path / name, "step")[3:]
            found[name] = statistics.median(one["tokens_per_s"] for one in steps)
            rows.append(
                f"{ranks:5} {name:>18} {found[name]:9,.0f} {found[name] / found['dp1']:12.2f}"
                + (f" {found[name] / found['dp2']:12.2f}" if ranks > 1 else "")
            )
    with capsys.disabled():
        print("\nranks             layout  tokens/s  over 1 rank  over 2 (dp2)")
        print("\n".join(rows))


@pytest.mark.slow
def test_it_begins_with_a_model_of_its_own(tmp_path: Path) -> None:
    """A merged model of one run, with its tokenizer and tags, is what another begins with."""
    data = plant(tmp_path / "data", 60, 20)
    args = [*TAGGING, "--data.path", str(data), "--train.steps", "3", "--train.dtype", "float32"]
    done = alone([*args, *SMALL[:-2], "--checkpoint.dir", "first"], tmp_path)
    assert done.rc == 0, done.text
    first = tmp_path / "first"
    more = ["--data.tokenizer", str(first / "tokenizer.json"), "--checkpoint.dir", "second"]
    weights = ["--model.weights", str(first / "model.safetensors")]
    done = alone([*args, *weights, *more, "--optimizer.learning_rate", "1e-12"], tmp_path)
    assert done.rc == 0 and "begins with the weights" in done.stdout, done.text
    ours, theirs = (
        load_file(tmp_path / name / "model.safetensors") for name in ("first", "second")
    )
    assert ours.keys() == theirs.keys() and "tags.weight" in ours
    assert all((ours[name] - theirs[name]).abs().max() < 1e-6 for name in ours)


# --- must show 7 ----------------------------------------------------------------------------------


def test_a_bad_file_ends_the_job_on_all_ranks(tmp_path: Path) -> None:
    """What else is refused, and in which words, is seen in one process."""
    (tmp_path / "train.conll").write_text("a\tB-x\nb\tI-x\n")
    (tmp_path / "dev.conll").write_text("a\tO\n\nb\tB-y\n")
    run = run_ranks(2, [*TAGGING, *SMALL, "--data.path", "."], cwd=tmp_path, env=HOME)
    ended(run, 74, "dev.conll:3:", "B-y is not known")
