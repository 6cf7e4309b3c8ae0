"""The mesh: ranks arranged on named axes, and a group with its own communicators for each.

With ``Mesh.over(world, pipeline=2, tensor=2)`` on eight ranks the data axis takes what is left:

          tensor ->                      rank = (data * P + pipeline) * T + tensor
    pipeline  0 1 | 4 5                  mesh.tensor:    {0 1} {2 3} {4 5} {6 7}
        |     2 3 | 6 7                  mesh.pipeline:  {0 2} {1 3} {4 6} {5 7}
        v    data=0 data=1               mesh.data:      {0 4} {1 5} {2 6} {3 7}

The whole order is data, expert, pipeline, context, tensor. The expert axis divides the data axis:
replicas that share the experts lie side by side, and ``mesh.data`` spans both.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from mpmp.comm.bridge import Bridge
from mpmp.comm.executor import Executor
from mpmp.comm.group import Group
from mpmp.comm.mpi import MPI
from mpmp.comm.progress import LANES, Progress
from mpmp.comm.window import Windows
from mpmp.comm.world import World
from mpmp.config import AXES, Comm, layout_name
from mpmp.errors import ConfigError, LaunchError, LayoutError
from mpmp.programs import collectives, tuning
from mpmp.programs.partition import factorisations

SUMS: tuple[tuple[str, ...], ...] = (
    ("data", "expert", "context"),
    ("data", "expert", "context", "tensor"),
    ("data", "context"),
    ("data", "context", "tensor"),
    ("data", "expert"),
)
"""Axes over which gradients may be partial sums: of weights, of those that the ranks of a tensor
group use apart, the same of experts, and of weights that the context axis cuts."""


@dataclass(frozen=True)
class Mesh:
    """Groups of ranks by axis; ``index`` is this rank's place on each axis.

    ``data`` holds all replicas of the model, ``model`` the ranks of one of them, and ``everyone``
    the whole world. ``sums`` holds a group for each of SUMS, and ``ends`` (on the first and the
    last rank of a pipeline) the same with the ranks of both ends.
    """

    world: World
    sizes: dict[str, int]
    index: dict[str, int]
    data: Group
    expert: Group
    pipeline: Group
    context: Group
    tensor: Group
    model: Group
    everyone: Group
    sums: dict[tuple[str, ...], Group]
    ends: dict[tuple[str, ...], Group]
    zero: int = 0
    """What the replicas share out (config.Parallel.zero); it belongs to the layout's name."""
    sequence: bool = False
    """Whether ranks of a tensor group hold pieces of sequences; the same."""

    @property
    def layout(self) -> str:
        return layout_of(self.sizes, self.zero, self.sequence)

    @property
    def replica(self) -> int:
        """The number of this rank's replica of the model."""
        return self.index["data"] * self.sizes["expert"] + self.index["expert"]

    def sum_group(self, placement: Summed) -> Group:
        """The ranks whose gradients of a parameter are partial sums."""
        groups = self.ends if placement.shared_by else self.sums
        return groups[placement.summed]

    def free(self) -> None:
        """Give all communicators back to MPI; all ranks together, and nothing under way."""
        groups = [self.data, self.expert, self.pipeline, self.context, self.tensor]
        groups += [self.model, self.everyone, *self.sums.values(), *self.ends.values()]
        self.data.stop()  # all groups of a mesh share one progress
        for group in dict.fromkeys(groups):
            group.free()

    @classmethod
    def over(
        cls,
        world: World,
        *,
        data: int | None = None,
        pipeline: int = 1,
        context: int = 1,
        tensor: int = 1,
        expert: int = 1,
        zero: int = 0,
        sequence: bool = False,
        settings: Comm | None = None,
    ) -> Mesh:
        """Arrange all ranks of the world; raises LayoutError where the product does not fit."""
        sizes = fit(world.size, data, pipeline, context, tensor, expert)
        if sequence and tensor == 1:
            raise LayoutError(
                f"layout {layout_of(sizes, zero, sequence)} cuts sequences over the tensor axis, "
                "which has one rank; leave sp out or use tp2 and more"
            )
        index = index_of(world.rank, sizes)
        settings = settings or Comm()
        for collective in collectives.COLLECTIVES:
            name = getattr(settings, collective)
            if name != "auto":
                collectives.find(collective, name)  # refuses an unknown one now, not at first use
        _agree(world, layout_of(sizes, zero, sequence), settings)
        _say_whether_shared(world, settings)
        table = None if settings.table is None else read_table(settings.table, world)
        hosts = _hosts(world)
        progress = Progress(world.until, world.overlap)

        def made(comm: MPI.Comm, name: str, chosen: Comm) -> Group:
            """The group of a communicator's ranks, in the same order."""
            assert isinstance(comm, MPI.Intracomm)
            ranks = tuple(comm.allgather(world.rank))
            # One communicator a purpose: operations that are waited for at once, and operations
            # that a thread drives meanwhile, must not take each other's messages.
            now = Executor(world, comm, ranks, name)
            started = Executor(world, comm.Dup(), ranks, f"{name} (started)", LANES)
            there = _numbered([hosts[rank] for rank in ranks])
            found = Group(now, started, progress, chosen, there, table)
            found.share(*windows_of(found, now, chosen))
            if chosen.windows != "off":
                # Algorithms that were set are the whole group's, not those of its parts.
                plain = Comm(windows=chosen.windows, explain=chosen.explain)
                found.bridge = Bridge.over(
                    now,
                    there,
                    lambda color, part: made(comm.Split(color, comm.rank), f"{name} {part}", plain),
                )
            return found

        def group(name: str, *axes: str, member: bool = True) -> Group | None:
            """Ranks that differ from this one along ``axes`` alone, in the order of the world."""
            color = 0
            for axis in AXES:
                color = color * sizes[axis] + (0 if axis in axes else index[axis])
            comm = world.comm.Split(color if member else MPI.UNDEFINED, world.rank)
            return None if comm == MPI.COMM_NULL else made(comm, name, settings)

        def certain(name: str, *axes: str) -> Group:
            found = group(name, *axes)
            assert found is not None
            return found

        at_end = sizes["pipeline"] > 1 and index["pipeline"] in (0, sizes["pipeline"] - 1)
        sums: dict[tuple[str, ...], Group] = {}
        ends: dict[tuple[str, ...], Group] = {}
        # One group for those sums that are over the same ranks in this layout.
        for over, alike in _alike(sizes).items():
            summed = certain("+".join(over) or "data", *over)
            both = group("+".join(("ends", *over)), "pipeline", *over, member=at_end)
            for axes in alike:
                sums[axes] = summed
                if both is not None:
                    ends[axes] = both
        return cls(
            world,
            sizes,
            index,
            data=sums["data", "expert"],
            expert=certain("expert", "expert"),
            pipeline=certain("pipeline", "pipeline"),
            context=certain("context", "context"),
            tensor=certain("tensor", "tensor"),
            model=certain("model", "pipeline", "context", "tensor"),
            everyone=certain("everyone", *AXES),
            sums=sums,
            ends=ends,
            zero=zero,
            sequence=sequence,
        )

    @classmethod
    def single(cls, world: World) -> Mesh:
        """A mesh of this rank alone: the whole model in one process."""
        progress = Progress(world.until, False)

        def alone(name: str) -> Group:
            executor = Executor(world, MPI.COMM_SELF, (world.rank,), name)
            return Group(executor, executor, progress, Comm(), (0,))

        sizes, index = dict.fromkeys(AXES, 1), dict.fromkeys(AXES, 0)
        replicas = alone("data")
        return cls(
            world,
            sizes,
            index,
            data=replicas,
            expert=alone("expert"),
            pipeline=alone("pipeline"),
            context=alone("context"),
            tensor=alone("tensor"),
            model=alone("model"),
            everyone=alone("everyone"),
            sums=dict.fromkeys(SUMS, replicas),
            ends={},
        )


class Summed(Protocol):
    """What a mesh asks of a parameter's placement."""

    @property
    def summed(self) -> tuple[str, ...]: ...
    @property
    def shared_by(self) -> tuple[int, ...]: ...


def fit(
    world: int, data: int | None, pipeline: int, context: int, tensor: int, expert: int
) -> dict[str, int]:
    """Sizes of the axes for a world; a LayoutError names the product and the legal layouts."""
    asked = {"data": data, "pipeline": pipeline, "context": context, "tensor": tensor}
    for axis, size in (asked | {"expert": expert}).items():
        if size is not None and size < 1:
            raise LayoutError(f"the {axis} axis of a mesh has at least one rank, not {size}")
    inner = pipeline * context * tensor
    if data is None:
        data = max(1, world // inner)
    name = layout_name(data, pipeline, context, tensor, expert)
    if data * inner != world:
        axes = 3 if context == 1 else 4
        legal = ", ".join(_named(one) for one in factorisations(world, axes))
        raise LayoutError(
            f"layout {name} needs {data * inner} ranks but {world} were started; "
            f"legal layouts for {world}: {legal}"
        )
    if data % expert:
        raise LayoutError(
            f"layout {name} shares the experts over {expert} of {data} replicas, which {expert} "
            "must divide"
        )
    sizes = {"data": data // expert, "expert": expert}
    return sizes | {"pipeline": pipeline, "context": context, "tensor": tensor}


def _alike(sizes: dict[str, int]) -> dict[tuple[str, ...], list[tuple[str, ...]]]:
    """SUMS by those of their axes along which this layout has several ranks."""
    found: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    for axes in SUMS:
        found.setdefault(tuple(axis for axis in axes if sizes[axis] > 1), []).append(axes)
    return found


def layout_of(sizes: dict[str, int], zero: int = 0, sequence: bool = False) -> str:
    """The name of a layout from the sizes of its axes."""
    return layout_name(
        sizes["data"] * sizes["expert"],
        sizes["pipeline"],
        sizes["context"],
        sizes["tensor"],
        sizes["expert"],
        zero,
        sequence,
    )


def _named(sizes: tuple[int, ...]) -> str:
    data, pipeline, *context, tensor = sizes
    return layout_name(data, pipeline, context[0] if context else 1, tensor)


def _agree(world: World, layout: str, settings: Comm) -> None:
    """ConfigError on all ranks where they ask for different meshes: they would hang later."""
    told = asdict(settings)
    told["table"] = settings.table and "a file"  # of which only rank 0's is read
    asked = json.dumps({"layout": layout, **told})
    said = [json.loads(text) for text in world.gather_texts(asked)]
    for rank, one in enumerate(said):
        for name, value in one.items():
            if value != said[0][name]:
                raise ConfigError(
                    f"all ranks must ask for the same mesh: {name} is {said[0][name]} on rank 0, "
                    f"{value} on rank {rank}"
                )


def read_table(path: str, world: World) -> tuning.Table:
    """A file of measurements, read by rank 0 alone: ranks that choose differently hang."""
    said = {"text": ""}
    if world.rank == 0:
        try:
            said = {"text": Path(path).read_text(encoding="utf-8")}
        except (OSError, UnicodeDecodeError) as error:
            said = {"error": f"comm.table {path} cannot be read: {error}"}
    said = json.loads(world.gather_texts(json.dumps(said))[0])
    if "error" in said:
        raise ConfigError(said["error"])
    return tuning.from_json(said["text"])


def windows_of(group: Group, executor: Executor, settings: Comm) -> tuple[Windows | None, str]:
    """The windows of a group, or why there are none."""
    world = executor.world
    if settings.windows == "off":
        return None, "--comm.windows is off"
    if len(set(group.hosts)) > 1:
        return None, f"its ranks are on {len(set(group.hosts))} hosts"
    if world.shares is None:
        return None, world.why_no_shares
    demanded = settings.windows == "on"
    return Windows(world, world.shares, executor.comm, group.ranks, group.name, demanded), ""


def _say_whether_shared(world: World, settings: Comm) -> None:
    """One line a host where memory cannot be shared; LaunchError where that was demanded."""
    if world.shares is not None or settings.windows == "off" or world.ranks_on_host == 1:
        return
    why = f"the ranks of {world.host} cannot share memory: {world.why_no_shares}"
    if settings.windows == "on":
        raise LaunchError(f"{why}; --comm.windows auto sends messages instead")
    if world.local_rank == 0:
        print(f"[{world.name}] {why}; they send messages instead, which is slower", file=sys.stderr)


def _hosts(world: World) -> list[int]:
    """For each rank of the world the first rank of its host."""
    here = world.comm.Split_type(MPI.COMM_TYPE_SHARED, world.rank)
    first = here.bcast(world.rank)
    here.Free()
    return world.comm.allgather(first)


def _numbered(hosts: list[int]) -> tuple[int, ...]:
    """Hosts by the order in which they appear: 0 for that of the first rank."""
    order = {host: number for number, host in enumerate(dict.fromkeys(hosts))}
    return tuple(order[host] for host in hosts)


def index_of(rank: int, sizes: dict[str, int]) -> dict[str, int]:
    """A rank's place on each axis."""
    index = {}
    for axis in reversed(AXES):
        rank, index[axis] = divmod(rank, sizes[axis])
    return index
