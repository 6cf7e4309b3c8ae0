"""Saving: shards, manifest, rename, ``latest``, prune; at no point is there no good checkpoint.

all ranks   see the empty step_N.tmp that rank 0 made, and that there is room
all ranks   copy their share of the state (in the background), or leave it where it is
a thread    writes and fsyncs this rank's shard, and hashes it meanwhile
all ranks   agree, at the end of some step, that all have written
a thread    of rank 0: manifest, fsync; rename to step_N, fsync; move latest, fsync; prune
all ranks   agree, at the end of some step, that it is there

Threads know nothing of MPI. What one could not do is told at the next agreement, as one error of
all ranks. Without the background the same happens in one go.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpmp.checkpoint import folder as run_folder
from mpmp.checkpoint import manifest
from mpmp.checkpoint.blocks import write_file
from mpmp.checkpoint.extents import Extent
from mpmp.checkpoint.held import Held
from mpmp.checkpoint.manifest import Manifest
from mpmp.checkpoint.points import point
from mpmp.checkpoint.shard import Buffer, holding, in_place
from mpmp.checkpoint.sharing import Holding, Share, share_out, size_of, stored
from mpmp.checkpoint.tensorfile import DTYPES, NAMES
from mpmp.comm.agreement import AGREED, exchange, on_first, together
from mpmp.errors import CheckpointError, InputOutputError

if TYPE_CHECKING:
    from mpmp.comm.mesh import Mesh


def save(
    folder: Path, step: int, held: Sequence[Held], meta: Mapping[str, Any], mesh: Mesh, keep: int
) -> Path:
    """Save what every rank holds as a step's checkpoint, all ranks together; returns its folder.

    ``held`` is all that this rank has; replicas share the writing out. ``meta`` is of JSON, and
    rank 0's is kept; ``keep`` checkpoints stay in ``folder``, this one among them. Raises
    InputOutputError on every rank alike, and then leaves nothing behind.
    """
    saver = Saver(folder, mesh, keep, background=False)
    saver.begin(step, held, meta)
    path = saver.finish()
    assert path is not None
    return path


class Saver:
    """Saves one checkpoint after the other in a run's folder.

    In the ``background``, :meth:`begin` returns when the state was copied. From then on every
    rank says after each step whether it is :meth:`done`; when all are, all call :meth:`settle`.
    """

    def __init__(self, folder: Path, mesh: Mesh, keep: int, *, background: bool) -> None:
        self._folder, self._mesh, self._keep, self._background = folder, mesh, keep, background
        self._buffer = Buffer()
        self._known: list[Holding] | None = None
        self._every: list[list[Holding]] = []
        self._shares: list[Share | None] = []
        self._serial: int | None = None
        self._task: _Task | None = None
        self._publish: Callable[[Sequence[Any]], None] | None = None
        self._name = ""
        self._distrusted: Collection[str] = ()

    def distrust(self, names: Collection[str]) -> None:
        """Do not count steps among those to keep: loading has found them damaged."""
        self._distrusted = names

    def begin(self, step: int, held: Sequence[Held], meta: Mapping[str, Any]) -> None:
        """Save a step, or begin to; all ranks together, and none is under way."""
        assert self._task is None
        # As it will be read back; a value that JSON does not know is an error on every rank at
        # once.
        meta = json.loads(json.dumps(meta, allow_nan=False))
        mesh, folder = self._mesh, self._folder
        self._share_out(held)
        self._name = on_first(
            f"prepare {folder} for a save", lambda: self._prepare(folder, step), mesh
        )
        share = self._shares[mesh.everyone.rank]
        try:
            self._require_room()
            self._task = _Task(
                f"write {self._unfinished / shard_name(mesh.everyone.rank)}",
                self._writing(share, held),
                self._background,
            )
        except AGREED:
            self._give_up()
            raise
        self._publish = lambda prints: self._finish(step, meta, prints)

    def done(self) -> bool:
        """Whether something is under way, and this rank's part in it is done."""
        return self._task is not None and self._task.done()

    def settle(self) -> Path | None:
        """Agree on what is under way, and go on with it; all ranks together.

        Waits for those that are not done. Returns the folder of a checkpoint that is now there.
        """
        assert self._task is not None
        task, self._task = self._task, None
        try:
            results = together(task.what, task.result, self._mesh)
        except AGREED:
            self._give_up()
            raise
        if self._publish is None:
            return self._folder / self._name
        point("all synced")
        publish, self._publish = self._publish, None
        is_first = self._mesh.everyone.rank == 0
        self._task = _Task(
            f"finish {self._folder / self._name}",
            (lambda: publish(results)) if is_first else lambda: None,
            self._background,
        )
        return None

    def finish(self) -> Path | None:
        """Wait until nothing is under way; all ranks together. As :meth:`settle`."""
        path = None
        while self._task is not None:
            path = self.settle()
        return path

    # --- the steps ------------------------------------------------------------------------------

    @property
    def _unfinished(self) -> Path:
        return self._folder / f"{self._name}.tmp"

    def _share_out(self, held: Sequence[Held]) -> None:
        """Know who writes what; it is worked out anew where anybody holds anything else."""
        own: list[Holding] = []

        def changed() -> bool:
            own.extend(holding(one) for one in held)
            return own != self._known

        if any(together("look at what is to be saved", changed, self._mesh)):
            said = exchange(json.dumps([_describe(one) for one in own]), self._mesh)
            self._every = [[_holding(one) for one in json.loads(text)] for text in said]
            self._shares, self._known = share_out(self._every), own

    def _prepare(self, folder: Path, step: int) -> str:
        """Make the empty folder of a save; its name."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in run_folder.unfinished(folder):
            with suppress(OSError):  # it takes room, but no save needs its name
                run_folder.remove(folder / name)
        if self._serial is None:
            self._serial = last_serial(folder)
        name = run_folder.free_name(folder, step)
        (folder / f"{name}.tmp").mkdir()
        return name

    def _require_room(self) -> None:
        """Raise InputOutputError on all ranks where the shards would not fit on the disk."""
        mesh, unfinished = self._mesh, self._unfinished

        def look() -> int:
            if not unfinished.is_dir():
                raise InputOutputError(
                    f"rank {mesh.everyone.rank} does not see {unfinished}, which rank 0 made; "
                    "--checkpoint.dir must lie on a file system that all hosts share"
                )
            return shutil.disk_usage(unfinished).free

        free = min(together(f"look for room in {unfinished}", look, mesh))
        run_folder.require_room(unfinished, size_of(self._shares), free)

    def _writing(self, share: Share | None, held: Sequence[Held]) -> Callable[[], Any]:
        """What the thread does: the rank's shard, and the fingerprint that comes of it."""
        path = self._unfinished / shard_name(self._mesh.everyone.rank)
        if share is None:
            parts = None
        else:
            parts = self._buffer.copy(share, held) if self._background else in_place(share, held)

        def write() -> Any:
            point("before shards")
            written = None if parts is None else manifest.describe(write_file(path, parts))
            point("shard synced")
            return written

        return write

    def _finish(self, step: int, meta: Mapping[str, Any], prints: Sequence[Any]) -> None:
        """Rank 0: have the checkpoint there, and those that it makes too old no more."""
        folder, name = self._folder, self._name
        assert self._serial is not None
        files = {
            shard_name(rank): manifest.fingerprint(one)
            for rank, one in enumerate(prints)
            if one is not None
        }
        tensors = stored(self._shares, (one for own in self._every for one in own))
        self._serial += 1
        whole = Manifest(step, self._serial, self._mesh.layout, files, tensors, meta)
        publish(folder, name, whole)
        with suppress(OSError):  # the checkpoint is there; the next save tries again
            run_folder.prune(folder, self._keep, self._distrusted)
        point("pruned")

    def _give_up(self) -> None:
        if self._mesh.everyone.rank == 0:
            shutil.rmtree(self._unfinished, ignore_errors=True)
        self._publish = None


def publish(folder: Path, name: str, whole: Manifest) -> None:
    """From shards that are on the disk to a checkpoint that is there, whatever kills the job."""
    unfinished = folder / f"{name}.tmp"
    run_folder.write_durably(unfinished / manifest.FILE, whole.to_text())
    run_folder.sync_folder(unfinished)
    point("manifest")
    os.rename(unfinished, folder / name)
    run_folder.sync_folder(folder)
    point("renamed")
    run_folder.replace_durably(folder / run_folder.LATEST, f"{name}\n")
    point("latest")


class _Task:
    """Work done by a thread, or at once; its error is raised where its result is asked for."""

    def __init__(self, what: str, work: Callable[[], Any], background: bool) -> None:
        self.what = what
        self._outcome: Future[Any] = Future()

        def run() -> None:
            try:
                self._outcome.set_result(work())
            except BaseException as error:
                self._outcome.set_exception(error)

        if background:
            # A daemon: a job that ends by an error does not wait for a disk.
            threading.Thread(target=run, name=what, daemon=True).start()
        else:
            run()

    def done(self) -> bool:
        return self._outcome.done()

    def result(self) -> Any:
        return self._outcome.result()


def shard_name(rank: int) -> str:
    return f"shard_{rank:05}.safetensors"


def last_serial(folder: Path) -> int:
    """The number of the save that came last; those that cannot be read do not count."""
    serial = 0
    for name in run_folder.step_folders(folder):
        try:
            serial = max(serial, run_folder.read_manifest(folder / name)[1].serial)
        except (CheckpointError, OSError):
            pass  # loading says what is wrong with it
    return serial


def _describe(one: Holding) -> list[Any]:
    return [one.key, NAMES[one.dtype], one.shape, one.extent.box, one.extent.start, one.extent.stop]


def _holding(said: list[Any]) -> Holding:
    key, dtype, shape, box, start, stop = said
    extent = Extent(tuple((low, high) for low, high in box), start, stop)
    return Holding(key, DTYPES[dtype], tuple(shape), extent)
