"""The script of ``make gpu``, tried on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from harness import MPI_LIBRARY, ROOT
from harness.launch import clean_environment

pytestmark = pytest.mark.timeout(240)

SCRIPT = ROOT / "tests" / "gpu" / "run.sh"


def run_script(out: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    env = clean_environment({"MPMP_PYTHON": sys.executable, "OUT": str(out), **variables})
    return subprocess.run(
        ["bash", str(SCRIPT)], env=env, capture_output=True, text=True, timeout=200
    )


@pytest.mark.skipif(MPI_LIBRARY != "openmpi", reason="once is enough, on Open MPI")
@pytest.mark.slow
def test_the_whole_flow_on_the_cpu(tmp_path: Path) -> None:
    run = run_script(tmp_path, MPMP_GPU_DRY="1")
    assert run.returncode == 0, run.stdout + run.stderr
    figures = (tmp_path / "gpu-figures.md").read_text()
    assert "no figures of a GPU" in figures
    for words in (
        "MPI: ",
        "windows: none (no GPU)",
        "| staged | 1 MiB |",
        "verify dp1.pp1.tp2",
        "tokens/s",
        "windows on 2 ranks: passed",
        "tests on 2 ranks: passed",
    ):
        assert words in figures, figures
    assert "FAILED" not in figures


FAKE_MPIRUN = """#!/bin/sh
case "$*" in
*measure.py*) echo "- MPI: $OPAL_PREFIX" ;;
*verify*) echo "planted failure"; exit 7 ;;
*train*) exit 1 ;;
esac
"""


def test_a_failing_section_stops_no_other(tmp_path: Path) -> None:
    fake = tmp_path / "mpi" / "bin" / "mpirun"
    fake.parent.mkdir(parents=True)
    fake.write_text(FAKE_MPIRUN)
    fake.chmod(0o755)
    archive = tmp_path / "mpi.tgz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "mpi", "mpi")
    run = run_script(tmp_path, MPMP_GPU_DRY="1", MPMP_MPI_ARCHIVE=str(archive))
    figures = (tmp_path / "gpu-figures.md").read_text()
    assert run.returncode == 1, run.stdout + run.stderr
    assert run.stdout.rstrip().endswith("failed: verify on 2 ranks\nfailed: training on 2 ranks")
    assert "verify on 2 ranks: FAILED with code 7" in figures
    assert "tests on 2 ranks: passed" in figures
    assert f"{os.sep}mpi{os.sep}mpi" in figures  # the archive's mpirun ran, with its prefix set
    assert "planted failure" in (tmp_path / "gpu.log").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    run = run_script(tmp_path)
    assert run.returncode == 3
    assert "no python here has a torch that sees a GPU" in run.stderr
