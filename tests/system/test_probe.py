"""The probe of device memory, with children that crash, hang, lie or do not start."""

from __future__ import annotations

import os
import sys

import pytest
import torch

from harness import run_ranks
from mpmp.comm import probe
from mpmp.comm.probe import Child, Verdict, ask
from mpmp.errors import ConfigError


def child(code: str, started: bool = True) -> Child:
    begin = f"print({probe._STARTED!r}, flush=True)\n" if started else ""
    return Child([sys.executable, "-c", f"import os, signal, sys, time\n{begin}{code}"], "so")


GOOD = child("pass")


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "ended by SIGSEGV"),
        ("sys.exit(139)", "ended by SIGSEGV"),  # as mpirun tells of a rank
        (f"sys.exit({probe._WRONG})", "wrong bytes"),
        ("time.sleep(1000)", "did not end within 2 s"),
        ("signal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(1000)", "did not end"),
        ("raise ValueError('device pointer')", "code 1: ValueError: device pointer"),
    ],
)
def test_a_child_that_fails_means_staging(
    code: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "_GRACE_S", 0.3)
    verdict = ask([child(code), GOOD], limit_s=2)
    assert not verdict.aware
    assert reason in verdict.reason


def test_a_child_that_succeeds_means_straight() -> None:
    assert ask([GOOD]) == Verdict(True, "a probe moved device memory so")


def test_the_next_is_asked_only_where_ranks_did_not_start() -> None:
    missing = Child(["/no/such/mpirun"], "never")
    alone = child(f"sys.exit({probe._ALONE})", started=False)
    assert ask([missing, alone, GOOD]).aware
    assert not ask([missing, alone]).aware


def test_all_hosts_must_be_able() -> None:
    good, bad = Verdict(True, "good"), Verdict(False, "bad")
    assert probe.weakest([good, None, good]) == good
    assert probe.weakest([good, None, bad]) == bad
    assert str(probe.weakest([None])) == "staged (no GPU)"


def test_staging_can_be_forced_and_straight_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)
    monkeypatch.setenv("MPMP_CUDA_AWARE", "0")
    assert probe.probe(gpu) == Verdict(False, "MPMP_CUDA_AWARE=0")
    monkeypatch.setenv("MPMP_CUDA_AWARE", "1")
    with pytest.raises(ConfigError, match="may be 0"):
        probe.probe(gpu)


def test_a_child_inherits_settings_and_no_job() -> None:
    settings = {
        "OMPI_MCA_pml": "ob1",
        "PRTE_MCA_plm": "ssh",
        "OPAL_PREFIX": "/srv/mpi",
        "UCX_TLS": "cuda",
        "CUDA_VISIBLE_DEVICES": "1",
        "LD_LIBRARY_PATH": "/srv/mpi/lib",
    }
    job = {
        "OMPI_COMM_WORLD_RANK": "1",
        "OMPI_MCA_num_procs": "2",
        "PMIX_RANK": "1",
        "PMI_FD": "11",
        "SLURM_JOB_ID": "7",
        "PRTE_LAUNCHED": "1",
    }
    found = probe.environment({**settings, **job})
    assert settings.items() <= found.items()
    assert not job.keys() & found.keys()


# Inside a running job, as the world asks; CPU memory in the place of the GPU's.
INSIDE = """
import torch
from mpmp.comm.world import start
from mpmp.comm.probe import ask, children
device = torch.device("cpu")
candidates = children(device)
assert len(candidates) == 2, candidates
print(*[ask([one]) for one in candidates], sep="\\n")
start("cpu")
"""


def test_real_children_inside_a_job() -> None:
    run = run_ranks(1, ["-c", INSIDE], timeout=120)
    assert run.rc == 0, run.text
    assert "straight (a probe moved device memory between two ranks)" in run.stdout
    assert "straight (a probe moved device memory within one rank" in run.stdout


def test_the_mpirun_of_a_library_is_found(tmp_path_factory: pytest.TempPathFactory) -> None:
    prefix = tmp_path_factory.mktemp("mpi")
    library = prefix / "lib" / "x86_64" / "libmpi.so.40"
    assert probe.mpirun_beside(None) is None
    mpirun = prefix / "bin" / "mpirun"
    mpirun.parent.mkdir()
    mpirun.write_text("#!/bin/sh\n")
    assert probe.mpirun_beside(library) != str(mpirun)
    os.chmod(mpirun, 0o755)
    assert probe.mpirun_beside(library) == str(mpirun)
