"""Sums in shared memory in a program of a user's: ``in_windows.py HOW``; one rank may not go on."""

from __future__ import annotations

import os
import signal
import sys
import time

import torch

import mpmp
from mpmp.comm.window import WindowOperation

how, mesh, world = sys.argv[1], mpmp.mesh(), mpmp.world()
group, odd = mesh.data, world.rank == 1

if how == "sums":
    for length in (5, 1000, 300_000, 3_000_000):
        for x in (torch.ones(length), group.empty((length,), torch.float32).fill_(1)):
            assert bool((group.allreduce(x) == world.size).all()), length
            prepared = group.prepare_allreduce(x)
            prepared.run()
            prepared.start().wait()
            assert bool((x == world.size**2).all()), length
    print(f"rank {world.rank} sums are right", flush=True)
    sys.exit(0)

x = group.empty((400_000,), torch.float32).fill_(1)
prepared = group.prepare_allreduce(x, algorithm="window")
assert isinstance(prepared, WindowOperation)
prepared.run()
print(f"rank {world.rank} up", flush=True)
turn = 0


def fail() -> None:
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "raise":
        raise ValueError("planted error")
    if how == "exit":
        sys.exit(0)


while True:
    turn += 1
    prepared.start()  # this rank has arrived; the others wait for its part of the sum
    if odd and turn == 200:
        time.sleep(0.3)
        fail()
    prepared.wait()
