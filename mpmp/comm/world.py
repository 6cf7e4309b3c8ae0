"""The world: pick the GPU, then start MPI, share out the cores, fail together."""

from __future__ import annotations

import os
import socket
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from mpmp.comm import ending, memory
from mpmp.comm.mpi import MPI
from mpmp.comm.probe import probe, weakest
from mpmp.comm.progress import SHORT_NAP_S, growing
from mpmp.comm.share import Shares, open_shares
from mpmp.errors import LaunchError, PeerError, TensorError
from mpmp.launcher import told_local_rank, told_size

# How long a waiter spins, yields and naps before it sleeps: small messages take microseconds, and
# a rank that waits for a long computation must leave the core to it.
_SPINS = 20
_YIELD_S = 0.02
_SLEEP_S = 1e-3
_NAP_UNTIL_S = 1.0
_LEFT_TAG = 1
_LOOK_S = 1.0


@dataclass
class World:
    """All ranks of the job, as this rank sees them."""

    rank: int
    size: int
    host: str
    local_rank: int
    ranks_on_host: int
    threads: int
    device: torch.device
    library: str
    """Name and version of the MPI library."""
    comm: MPI.Intracomm
    control: MPI.Intracomm
    """Communicator of start and end alone, so that no other traffic is mistaken for theirs."""
    overlap: bool
    """MPI may be called by several threads at once, so a thread can drive started operations."""
    cuda_aware: bool = False
    """MPI was seen to move device memory; else GPU tensors are staged through pinned memory."""
    gpu_path: str = "no GPU"
    """How GPU tensors travel and why, in words."""
    shares: Shares | None = None
    """Memory that the ranks of this host share."""
    why_no_shares: str = ""
    trace: bool = False
    limit_s: float = 600.0
    """Seconds a rank waits for a peer before it gives the job up."""
    born_s: float = field(default_factory=time.perf_counter)
    meanwhile: dict[object, Callable[[], None]] = field(default_factory=dict)
    """What the main thread does for others while it waits: by their owners."""

    @property
    def name(self) -> str:
        return f"rank {self.rank}/{self.size} {self.host}"

    def wait(
        self,
        requests: Sequence[MPI.Request],
        waiting_for: Callable[[], str],
        *,
        peers: Sequence[Sequence[int]] = (),
        statuses: list[MPI.Status] | None = None,
        background: bool = False,
        limit_s: float | None = None,
    ) -> float:
        """Wait for requests, seconds it took; every wait of mpmp is this loop.

        Written in Python on purpose: inside a blocking MPI call no signal handler would run and
        no limit could end the wait. ``background`` naps from the start (the thread that drives
        started operations must not take the core from the computation). Raises PeerError after
        ``limit_s`` seconds or when a peer has left the job, TensorError where a message is longer
        than its place. ``peers`` names, for each request, the ranks of the world it depends on;
        ``statuses``, one a request, are filled in.
        """
        return self.until(
            lambda: self.test(requests, waiting_for, statuses),
            waiting_for,
            lambda: unfinished(requests, peers),
            nap=growing if background else None,
            limit_s=limit_s,
        )

    def test(
        self,
        requests: Sequence[MPI.Request],
        waiting_for: Callable[[], str],
        statuses: list[MPI.Status] | None,
    ) -> bool:
        """Whether all requests are done; the errors of `wait`."""
        try:
            return bool(MPI.Request.Testall(requests, statuses))
        except MPI.Exception as error:
            if error.Get_error_class() in (MPI.ERR_TRUNCATE, MPI.ERR_IN_STATUS):
                raise TensorError(
                    f"{waiting_for()} sent more than this rank expects; all ranks must make the "
                    "same calls with the same shapes"
                ) from error
            raise PeerError(
                f"MPI gave up on {waiting_for()}: {error.Get_error_string()}"
            ) from error

    def until(
        self,
        ready: Callable[[], bool],
        waiting_for: Callable[[], str],
        waited_for: Callable[[], Iterable[int]],
        *,
        nap: Callable[[float], float] | None = None,
        limit_s: float | None = None,
    ) -> float:
        """Call ``ready`` until it holds, seconds it took; the loop and its rules are `wait`'s.

        ``waited_for`` names the ranks of the world without which it cannot hold. ``nap`` says how
        long to nap, in the background, after so many seconds.
        """
        if ready():
            return 0.0
        start = time.perf_counter()
        limit = self.limit_s if limit_s is None else limit_s
        spins = 0
        next_look = 2 * _LOOK_S  # what a leaver has sent arrives long before that
        while not ready():
            spins += 1
            if spins < _SPINS and nap is None:
                continue
            if nap is None:
                for go_on in tuple(self.meanwhile.values()):
                    go_on()
            waited = time.perf_counter() - start
            if waited < _YIELD_S and nap is None:
                os.sched_yield()
            elif waited < _NAP_UNTIL_S:
                time.sleep(SHORT_NAP_S if nap is None else nap(waited))
            else:
                time.sleep(_SLEEP_S)
                if waited > limit:
                    raise PeerError(
                        f"waited {waited:.0f} s for {waiting_for()}; "
                        "a longer limit is set with --comm.timeout_s"
                    )
                if waited > next_look:
                    next_look = waited + _LOOK_S
                    self._look_for_leavers(waited_for(), waiting_for)
        return time.perf_counter() - start

    def _look_for_leavers(self, peers: Iterable[int], waiting_for: Callable[[], str]) -> None:
        """Raise PeerError where a peer that is still waited for has left the job."""
        for peer in peers:
            if self.control.Iprobe(source=peer, tag=_LEFT_TAG):
                raise PeerError(
                    f"rank {peer} left the job while this rank waited for {waiting_for()}"
                )

    def leave(self) -> None:
        """Tell all that this rank will send nothing any more, and wait for all to say so."""
        others = [rank for rank in range(self.size) if rank != self.rank]
        notes = [self.control.Isend([b"", MPI.BYTE], rank, _LEFT_TAG) for rank in others]
        done = self.control.Ibarrier()
        self.wait([*notes, done], lambda: "the others to finish", limit_s=float("inf"))

    def gather_texts(self, text: str, comm: MPI.Intracomm | None = None) -> list[str]:
        """Every rank's text on every rank of the world (or of another communicator)."""
        comm = comm or self.comm
        own = np.frombuffer(text.encode(), dtype=np.uint8)
        lengths = np.empty(comm.size, dtype=np.int64)
        request = comm.Iallgather(np.array([own.size]), lengths)
        everyone = [range(self.size)] if comm is self.comm else []
        self.wait([request], lambda: "all ranks to say something", peers=everyone)
        every = np.empty(int(lengths.sum()), dtype=np.uint8)
        request = comm.Iallgatherv(own, [every, lengths.tolist()])
        self.wait([request], lambda: "all ranks to say something")
        return [piece.tobytes().decode() for piece in np.split(every, np.cumsum(lengths)[:-1])]


def unfinished(requests: Sequence[MPI.Request], peers: Sequence[Sequence[int]]) -> Iterator[int]:
    """The peers of those requests that are not done."""
    for request, possible in zip(requests, peers, strict=False):
        if not request.Get_status():
            yield from possible


_world: World | None = None


def start(device: str = "auto", limit_s: float = 600.0) -> World:
    """Start MPI on the first call and return the world; later calls return the same world.

    The GPU is chosen before MPI starts, because a CUDA-aware MPI binds to the current one.
    Raises LaunchError where the launcher started ranks that MPI does not see as one job.
    """
    global _world
    if _world is not None:
        return _world
    chosen = _choose_device(device)
    verdict = None
    if chosen.type == "cuda":
        # One rank a host asks; the others wait for it in MPI's start.
        verdict = probe(chosen) if told_local_rank() == 0 else None
        torch.empty(1, device=chosen)  # makes the CUDA context that MPI will bind to
    if MPI.Is_initialized():
        thread_level = MPI.Query_thread()  # a program that imported mpi4py.MPI before us
    else:
        with warnings.catch_warnings():
            # mpi4py warns of a foreign launcher; _refuse_lone_ranks says what to do about it.
            warnings.simplefilter("ignore", RuntimeWarning)
            thread_level = MPI.Init_thread(MPI.THREAD_MULTIPLE)
    comm = MPI.COMM_WORLD.Dup()  # a program may use the other one itself
    _refuse_lone_ranks(comm.size)
    found = weakest(comm.allgather(verdict))
    host_comm = comm.Split_type(MPI.COMM_TYPE_SHARED)
    assert isinstance(host_comm, MPI.Intracomm)
    shares, why_no_shares = open_shares(host_comm, host_comm.allgather(comm.rank))
    world = World(
        rank=comm.rank,
        size=comm.size,
        host=socket.gethostname(),
        local_rank=host_comm.rank,
        ranks_on_host=host_comm.size,
        threads=_share_of_cores(host_comm),
        device=chosen,
        library=_library(),
        comm=comm,
        control=comm.Dup(),
        overlap=thread_level == MPI.THREAD_MULTIPLE,
        cuda_aware=found.aware,
        gpu_path=str(found) if chosen.type == "cuda" else "no GPU",
        shares=shares,
        why_no_shares=why_no_shares,
        trace=os.environ.get("MPMP_TRACE") == "1",
        limit_s=limit_s,
    )
    torch.set_num_threads(world.threads)
    memory.keep_freed()
    job = world.gather_texts(f"{os.getpid()}.{time.time_ns()}")[0]
    ledger = ending.open_ledger(job)
    host_comm.Barrier()
    if world.local_rank == 0:
        ending.unlink_ledger(job)
    host_comm.Free()
    ending.install(world.name, world.rank, world.size, ledger, world.leave, _abort)
    _world = world
    return world


def _library() -> str:
    name, version = MPI.get_vendor()
    return f"{name} {'.'.join(map(str, version))}"


def _abort(code: int) -> None:
    MPI.COMM_WORLD.Abort(code)


def _choose_device(device: str) -> torch.device:
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise LaunchError(
            "device cuda was asked for, but torch sees no GPU; use --train.device cpu"
        )
    index = told_local_rank() % torch.cuda.device_count()
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def _refuse_lone_ranks(size: int) -> None:
    """N jobs of one rank each, every one believing it is alone, would train N models."""
    started = told_size()
    if size == 1 and started > 1:
        raise LaunchError(
            f"the launcher started {started} ranks but this MPI ({_library()}) sees one; use the "
            "mpirun of the installed MPI, or srun --mpi=pmix (Open MPI), --mpi=pmi2 (MPICH)"
        )


def _share_of_cores(host_comm: MPI.Intracomm) -> int:
    """Threads of this rank: OMP_NUM_THREADS where set, else the host's allowed cores / its ranks.

    Two ranks with two threads each on two cores ran 15 times slower than with one each.
    """
    allowed: set[int] = set().union(*host_comm.allgather(os.sched_getaffinity(0)))
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if asked.isdigit() and int(asked) > 0:
        return int(asked)
    return max(1, len(allowed) // host_comm.size)
