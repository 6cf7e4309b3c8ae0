"""The end of a job: all ranks together, with one message and one exit code.

MPI leaves a job hanging whose one rank raises, exits or is interrupted. Here whatever ends one
rank early ends all of them at once: the rank says why in one line, ``[rank r/N host] ...``, and
aborts the job with the error's code. Of several ranks that fail together on a host one speaks.
"""

from __future__ import annotations

import atexit
import fcntl
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import NoReturn

from mpmp.errors import MpmpError, PeerError
from mpmp.launcher import say_once

_ALIKE = (2, 3, 74, 77, 78)
"""Codes of errors that every rank raises alike; rank 0 may speak for all."""


class Interrupted(MpmpError):
    """A signal reached this rank; the job ends with 128 + its number, as shells have it."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = 128 + number


@dataclass
class _Job:
    name: str
    rank: int
    size: int
    ledger: int
    leave: Callable[[], None]
    abort: Callable[[int], None]


_job: _Job | None = None


def install(
    name: str,
    rank: int,
    size: int,
    ledger: int,
    leave: Callable[[], None],
    abort: Callable[[int], None],
) -> None:
    """From now on an uncaught exception, a signal or an early exit ends the whole job.

    ``ledger`` is what :func:`open_ledger` gave; ``leave`` returns when all ranks have called it;
    ``abort`` ends all ranks with a code.
    """
    global _job
    _job = _Job(name, rank, size, ledger, leave, abort)
    sys.excepthook = _on_uncaught
    threading.excepthook = _on_uncaught_in_thread
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup and a shell's & leave it
                signal.signal(number, _on_signal)
    # A script that ends, or that calls sys.exit, waits here for the others; those who wait for
    # it in turn notice that it left (World.wait).
    atexit.register(_leave)


def run(command: Callable[[], None]) -> None:
    """Run a command's body; however it ends on this rank, all ranks end alike.

    ``sys.exit`` inside the body, with 0 too, is a rank that leaves before the job ends: code 76.
    """
    try:
        command()
        _leave()
    except SystemExit as left:
        end(PeerError(f"left the job early with sys.exit({left.code!r})"))
    except BaseException as error:
        end(error)


def end(error: BaseException) -> NoReturn:
    """Say once why the job ends, and end it on all ranks with the error's exit code."""
    code = error.exit_code if isinstance(error, MpmpError) else 1
    if isinstance(error, KeyboardInterrupt):
        error = Interrupted(signal.SIGINT)
        code = error.exit_code
    if _job is None:
        say_once(_sentence(error))
        os._exit(code)
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)  # another rank's end has nothing to add
    if code in _ALIKE and _job.rank != 0:
        time.sleep(0.3)
    say(_sentence(error), error)
    if _job.size > 1:
        _job.abort(code)
    os._exit(code)


def say(sentence: str, error: BaseException | None = None) -> None:
    """Print why the job ends, unless another rank of this host has; the job must end now.

    MPMP_TRACEBACK=1 adds where an error came from.
    """
    assert _job is not None
    if not _first_to_speak(_job.ledger):
        return
    sys.stdout.flush()
    lines = [f"[{_job.name}] {sentence}"]
    if error is not None and os.environ.get("MPMP_TRACEBACK") == "1":
        lines += [line.rstrip("\n") for line in traceback.format_exception(error)]
    sys.stderr.write("\n".join(lines) + "\n")
    sys.stderr.flush()
    # The launcher forwards this line and prints its own banner; ours comes first.
    time.sleep(0.1)


def _sentence(error: BaseException) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, MpmpError):
        return text
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {text}{place}; MPMP_TRACEBACK=1 shows the calls"


def open_ledger(key: str) -> int:
    """Open the file in which the ranks of a host note that one of them has spoken.

    Once all ranks have opened it one of them unlinks it: the note outlives the rank that made it
    and vanishes with the last one, whatever kills the job.
    """
    return os.open(_ledger_path(key), os.O_RDWR | os.O_CREAT, 0o600)


def unlink_ledger(key: str) -> None:
    os.unlink(_ledger_path(key))


def _ledger_path(key: str) -> str:
    return os.path.join(tempfile.gettempdir(), f"mpmp.{key}")


def _first_to_speak(ledger: int) -> bool:
    """Whether no rank of this job on this host has spoken yet."""
    fcntl.lockf(ledger, fcntl.LOCK_EX)
    try:
        if os.fstat(ledger).st_size > 0:
            return False
        os.write(ledger, b"spoken")
        return True
    finally:
        fcntl.lockf(ledger, fcntl.LOCK_UN)


def _leave() -> None:
    global _job
    if _job is None:
        return
    job = _job
    try:
        job.leave()
    except BaseException as error:
        end(error)
    _job = None


def _on_uncaught(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    end(error)


def _on_uncaught_in_thread(args: threading.ExceptHookArgs) -> None:
    if not isinstance(args.exc_value, SystemExit):  # ends that thread alone, as always in Python
        end(args.exc_value or MpmpError("a thread ended"))


def _on_signal(number: int, frame: FrameType | None) -> None:
    raise Interrupted(number)
