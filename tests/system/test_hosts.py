"""Several hosts, emulated: who shares what, sums across hosts, and the bytes that pass a link."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from harness import ROOT
from hosts.emulate import Hosts, lacking

pytestmark = pytest.mark.skipif(lacking() is not None, reason=str(lacking()))

RANKS = """
import json, os, sys, time
import torch
from hosts.inside import Ranks, count_bytes

ranks = Ranks()
group, world = ranks.group, ranks.world
sums, rounds = {}, {}
for name in ("hierarchical", "ring", "auto"):
    for length in (0, 1, 7, 100_003):
        x = (torch.arange(length) % 5 + world.rank).float()
        total = group.allreduce(x, algorithm=None if name == "auto" else name)
        right = world.size * (torch.arange(length) % 5) + sum(range(world.size))
        sums[f"{name} {length}"] = bool((total == right).all())
try:
    group.allreduce(torch.ones(4), algorithm="window")
    refusal = ""
except Exception as error:
    refusal = f"{type(error).__name__}: {error}"
mark = f"/dev/shm/mark-of-{world.host}"
open(mark, "w").close()
group.barrier()
marks = sorted(name for name in os.listdir("/dev/shm") if name.startswith("mark"))
for _ in range(3):
    ranks.slowest_run(group.barrier)
barrier_s = min(ranks.slowest_run(group.barrier) for _ in range(5))
counted = count_bytes(ranks, [("ring", 240_000), ("hierarchical", 240_000)])
assert not group.overlaps, "sums over hosts of several ranks cross a bridge, at once"
said = ranks.all([world.host, world.local_rank, world.ranks_on_host, marks, sums, refusal])
if world.rank == 0:
    with open(sys.argv[1], "w") as file:
        found = {"said": said, "hosts": group.hosts, "barrier_s": barrier_s, "counted": counted}
        json.dump(found, file)
ranks.mesh.free()
"""


def in_hosts(hosts, tmp_path, ranks=RANKS):
    script, answer = tmp_path / "ranks.py", tmp_path / "answer.json"
    script.write_text(ranks)
    done = hosts.run([script, answer], timeout=60, env={"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"})
    assert done.rc == 0, done.text
    return json.loads(answer.read_text())


@pytest.mark.mpich_too
def test_ranks_of_several_hosts_sum_and_share_only_what_they_should(tmp_path):
    with Hosts(4, 2, rate_mbit=0, delay_us=1000) as hosts:
        found = in_hosts(hosts, tmp_path)
    assert found["hosts"] == [0, 0, 1, 1, 2, 2, 3, 3]
    for rank, (name, local_rank, ranks_on_host, marks, sums, refusal) in enumerate(found["said"]):
        host = f"h{rank // 2 + 1}"
        assert (name, local_rank, ranks_on_host) == (host, rank % 2, 2)
        assert marks == [f"mark-of-{host}"]
        assert all(sums.values()), (rank, sums)
        assert refusal, "a window of ranks on several hosts was not refused"
    # Dissemination among 8 ranks takes three rounds; what is lower did not pass the links.
    assert found["barrier_s"] >= 3 * 1e-3
    for row in found["counted"]:
        assert row["right"], row
        # Of hierarchical only what passes between the hosts is a message.
        rounds = {"ring": 7, "hierarchical": 3}[row["algorithm"]]
        assert row["messages"] == [2 * rounds * 240_000 // 8] * 8
        # A ring passes a host's link once a round; hierarchical sends 2 (h-1)/h n in all there.
        passed = {"ring": 2 * 7 * 240_000 // 8, "hierarchical": 2 * 3 * 240_000 // 4}
        for card in row["card"]:
            assert passed[row["algorithm"]] < card < 1.1 * passed[row["algorithm"]], row


@pytest.mark.parametrize(
    "dealt", (False, pytest.param(True, marks=pytest.mark.slow)), ids=("in order", "dealt")
)
def test_hierarchical_sums_in_the_windows_of_each_host(tmp_path, dealt):
    sums = """
import json, sys
import torch
from hosts.inside import Ranks
from mpmp.comm.bridge import Bridge, Bridged

crossed = []
carry_out, run = Bridge.carry_out, Bridged.run
Bridge.carry_out = lambda *them: (crossed.append("now"), carry_out(*them))[1]
Bridged.run = lambda *them: (crossed.append("prepared"), run(*them))[1]
ranks = Ranks()
group = ranks.group
said = {}
for dtype in (torch.float32, torch.float64, torch.int64, torch.int16, torch.bfloat16):
    for length in (0, 1, 7, 200_003):
        for op in ("sum", "max", "prod"):
            def of(rank):
                x = torch.arange(length) + 3 * rank
                return (x % 5 if op != "prod" else 1 + (x % 7 == 0)).to(dtype)
            every = torch.stack([of(rank) for rank in range(group.size)])
            right = {"sum": lambda: every.sum(0), "max": lambda: every.amax(0),
                     "prod": lambda: every.prod(0)}[op]().to(dtype)
            total = group.allreduce(of(group.rank), op=op, algorithm="hierarchical")
            place = group.bridge.groups[0].empty if group.bridge._groups else torch.empty
            x = place((length,), dtype=dtype)
            handle = group.prepare_allreduce(x, op=op, algorithm="hierarchical")
            for call in (handle.run, lambda: handle.start().wait()):
                x.copy_(of(group.rank))
                call()
                said[f"{dtype} {length} {op}"] = torch.equal(x, right) and torch.equal(total, right)
            handle.free()
said = ranks.all([said, crossed])
if ranks.world.rank == 0:
    json.dump({"said": said, "hosts": group.hosts}, open(sys.argv[1], "w"))
ranks.mesh.free()
"""
    with Hosts(4, 2, rate_mbit=0, delay_us=100, dealt=dealt) as hosts:
        found = in_hosts(hosts, tmp_path, sums)
    assert found["hosts"] == ([0, 1, 2, 3] * 2 if dealt else [0, 0, 1, 1, 2, 2, 3, 3])
    for said, crossed in found["said"]:
        assert all(said.values()), said
        assert crossed == ["now", "prepared"] * 4 * 4 * 3, "16 bits alone keep the program"


def test_links_have_the_rate_that_was_asked_for(tmp_path):
    sends = """
import json, sys, time
import torch
from hosts.inside import Ranks
ranks = Ranks()
assert ranks.group.overlaps, "what goes over a network moves while ranks compute"
x = torch.zeros(500_000)
handle = ranks.group.prepare_allreduce(x, algorithm="ring")
handle.run()
seconds = [ranks.slowest_run(handle.run) for _ in range(3)]
if ranks.world.rank == 0:
    json.dump(min(seconds), open(sys.argv[1], "w"))
ranks.mesh.free()
"""
    with Hosts(2, rate_mbit=100, delay_us=100) as hosts:
        seconds = in_hosts(hosts, tmp_path, sends)
    # Each of the two ranks sends all 16 Mbit in two rounds; nothing can make that quicker.
    assert seconds >= 0.98 * 0.16


def test_nothing_is_left_of_hosts_that_are_killed(tmp_path):
    ranks = tmp_path / "ranks.py"
    ranks.write_text("import time; print('up', flush=True)\nwhile True: time.sleep(0.1)\n")
    mark = f"HOSTS_MARK={os.getpid()}.{time.monotonic_ns()}"
    name, _, value = mark.partition("=")
    command = [sys.executable, ROOT / "tests/hosts/emulate.py", "--hosts", "2", "--", ranks]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, name: value, "TMPDIR": str(tmp_path)},
    )
    assert process.stdout is not None and process.stdout.readline().startswith(b"up")
    assert len(_with_mark(mark)) > 3
    process.terminate()
    assert process.wait(10) == 143
    end = time.monotonic() + 5
    while _with_mark(mark) and time.monotonic() < end:
        time.sleep(0.05)
    assert not _with_mark(mark)
    assert [path.name for path in tmp_path.iterdir()] == ["ranks.py"]


def _with_mark(mark):
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
        except OSError:  # gone meanwhile
            pass
    return found
