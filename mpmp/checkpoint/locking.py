"""One job at a time on a run's folder."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from mpmp.checkpoint.alone import ALONE
from mpmp.checkpoint.folder import sync_folder
from mpmp.comm.agreement import on_first
from mpmp.errors import InputOutputError

if TYPE_CHECKING:
    from mpmp.comm.mesh import Mesh

FILE = ".lock"


@contextmanager
def locked(folder: Path, mesh: Mesh) -> Iterator[None]:
    """Make the folder and hold it for this job; InputOutputError on all ranks if another has it.

    The lock is rank 0's and the kernel's: a killed job leaves none behind, though it leaves the
    file. A job that fails holds it until its process ends, for a thread may still be saving.
    """
    held: list[int] = []
    ends = mesh is ALONE
    on_first(f"lock the run folder {folder}", lambda: held.append(_lock(folder)), mesh)
    try:
        yield
        ends = True
    finally:
        for descriptor in held if ends else ():
            os.close(descriptor)


def _lock(folder: Path) -> int:
    if not folder.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        sync_folder(folder.parent)
    descriptor = os.open(folder / FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
    except BlockingIOError:
        holder = os.read(descriptor, 200).decode(errors="replace")
        os.close(descriptor)
        raise InputOutputError(
            f"another job ({holder}) runs in {folder}; wait for its end or give this one a folder "
            "of its own with --checkpoint.dir"
        ) from None
    except OSError as error:
        # Some parallel file systems are mounted without locks; that is no reason not to train.
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
            os.close(descriptor)
            raise
    return descriptor
