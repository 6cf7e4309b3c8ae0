"""What the tests of commands share: a small model and text, and what may be said about an end."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from shlex import split
from typing import Any

from harness import ROOT, Run
from harness.launch import clean_environment

PLANTED = Path(__file__).parent / "planted"
HOME: dict[str, str | None] = {"PYTHONPATH": str(ROOT), "MPMP_TRACEBACK": None}
"""Commands run in folders of their own and find mpmp all the same."""

SMALL = split(
    "--data.path text.txt --model.layers 4 --model.heads 4 --model.width 32 --model.context 16 "
    "--train.batch 8 --train.eval_batches 1 --train.log_every 1 --train.sample_tokens 0 "
    "--optimizer.warmup_steps 2"
)
"""Less than half a second for 20 steps."""


def plant_text(folder: Path, name: str = "text.txt") -> Path:
    """Real text, the same on every machine of a Python version."""
    path = folder / name
    path.write_bytes(Path(argparse.__file__).read_bytes()[:60_000])
    return path


def alone(
    args: list[str],
    cwd: Path,
    env: Mapping[str, str | None] | None = None,
    timeout: float = 120,
) -> Run:
    """``python ARGS`` without a launcher."""
    done = subprocess.run(
        [sys.executable, *args],
        cwd=cwd,
        env=clean_environment({**HOME, **(env or {})}),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    return Run(done.returncode, done.stdout, done.stderr, 0.0, False, 0)


def our_line(run: Run) -> str:
    """The one line in which the job says why it ended; it must come first and stand alone."""
    lines = run.stderr.splitlines()
    ours = [line for line in lines if re.match(r"\[rank \d+/\d+ \S+\] ", line)]
    assert len(ours) == 1 and lines[0] == ours[0], f"not one line of ours, first:\n{run.text}"
    assert "Traceback" not in run.text, run.text
    return ours[0]


def ended(run: Run, code: int, *words: str) -> str:
    """See that a job ended with a code and one line that has the words; that line."""
    assert not run.timed_out and run.rc == code and run.left_behind == 0, run.text
    line = our_line(run)
    missing = [word for word in words if word not in line]
    assert not missing, f"{missing} not in the first line\n{run.text}"
    return line


def events(folder: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The lines of a run's metrics, of one kind of event or all."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    return [one for one in found if kind in (None, one["event"])]


def mpmp_names(*folders: str | Path) -> set[str]:
    """What mpmp has lying about in /dev/shm and other folders."""
    return {
        os.path.join(folder, name)
        for folder in ("/dev/shm", *folders)
        if os.path.isdir(folder)
        for name in os.listdir(folder)
        if "mpmp" in name
    }
