"""What a person sees: plain lines in a log, one rewritten line on a terminal; metrics survive."""

from __future__ import annotations

import io
import json

from mpmp.job import report
from mpmp.job.report import Metrics, Reporter, duration, table


def test_a_log_gets_every_nth_line_and_the_last():
    log = io.StringIO()
    show = Reporter(True, 10, log)
    for step in range(1, 26):
        show.progress(step, f"step {step}", last=step == 25)
    assert log.getvalue() == "step 10\nstep 20\nstep 25\n"


def test_a_terminal_gets_one_line_that_is_rewritten(monkeypatch):
    screen = io.StringIO()
    show = Reporter(True, 10, screen)
    show._terminal = "/dev/pts/none"
    monkeypatch.setattr(report, "_columns", lambda terminal: 8)
    for step in (1, 2):
        show.progress(step, f"step {step} and more", last=False)
    show.line("done")
    show.progress(3, "step 3", last=False)
    assert screen.getvalue() == "step 1 \n\x1b[1A\x1b[2Kstep 2 \ndone\nstep 3\n"


def test_other_ranks_are_silent():
    log = io.StringIO()
    show = Reporter(False, 1, log)
    show.line("x")
    show.progress(1, "x", last=True)
    assert log.getvalue() == ""


def test_table_and_duration():
    assert table(["rank", "x"], [["0", "10"], ["10", "1,000"]]).splitlines() == [
        "rank      x",
        "----  -----",
        "   0     10",
        "  10  1,000",
    ]
    assert [duration(s) for s in (0.4, 59.9, 61, 3599, 7300)] == [
        "0s",
        "59s",
        "1m01s",
        "59m59s",
        "2h01m",
    ]


def test_resumed_metrics_drop_the_steps_that_are_taken_again(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    first = Metrics(path, True, None)
    first.write(event="start", layout="dp1.pp1.tp1")
    for step in range(1, 5):
        first.write(event="step", step=step)
    with path.open("a") as file:
        file.write('{"event": "step", "st')  # cut short by a crash
    Metrics(path, True, resume_from=2).write(event="step", step=3)
    steps = [json.loads(line).get("step") for line in path.read_text().splitlines()]
    assert steps == [None, 1, 2, 3]
    Metrics(tmp_path / "none" / "metrics.jsonl", False, None).write(x=1)
    assert not (tmp_path / "none").exists()
