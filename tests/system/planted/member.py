"""A user's program over the library, one of whose ranks does not go on: ``member.py HOW``."""

from __future__ import annotations

import sys
import threading
import time

import torch

import mpmp

how, mesh, world = sys.argv[1], mpmp.mesh(), mpmp.world()
mesh.data.allreduce(torch.ones(3))
print(f"rank {world.rank} up with {torch.get_num_threads()} threads", flush=True)


def fail() -> None:
    raise ValueError("planted\nerror")


if how == "late to leave":
    time.sleep(5 if world.rank == 0 else 0)
    sys.exit(0)
if world.rank == 1:
    if how == "raises":
        fail()
    elif how == "thread":
        threading.Thread(target=fail).start()
    elif how.startswith("exit"):
        sys.exit(int(how.removeprefix("exit")))
    if how != "well":
        time.sleep(1000)
if how == "late for a set-up step":
    world.gather_texts("here")
total = mesh.data.allreduce(torch.ones(3))
print(f"sum {total.tolist()}", flush=True)
sys.exit(0)
