"""Work that succeeds on all ranks or fails on all with the same error.

A full disk is seen by one rank. If it raised alone the others would wait for it; so each rank
tries, all tell all how it went, and all return or all raise.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mpmp.errors import (
    CheckpointError,
    ConfigError,
    InputOutputError,
    LayoutError,
    MpmpError,
    TensorError,
)

if TYPE_CHECKING:  # A checkpoint can be written and read where there is no MPI.
    from mpmp.comm.mesh import Mesh

AGREED = (CheckpointError, ConfigError, InputOutputError, LayoutError, TensorError)
"""Errors that are told to the others; anything else (a signal, a bug) ends the job at once."""


def together(what: str, work: Callable[[], Any], mesh: Mesh) -> list[Any]:
    """Every rank's result of its own work, on every rank; results are of JSON.

    Raises on every rank the error of the first rank that failed; an OSError becomes
    ``InputOutputError("rank 1 could not <what>: No space left on device")``.
    """
    cause: Exception | None = None
    said: dict[str, Any]
    try:
        said = {"result": work()}
    except AGREED as error:
        kind = next(kind for kind in AGREED if isinstance(error, kind))
        cause, said = error, {"error": kind.__name__, "text": str(error)}
    except OSError as error:
        text = f"rank {mesh.everyone.rank} could not {what}: {reason(error, what)}"
        cause, said = error, {"error": "InputOutputError", "text": text}
    outcomes = [json.loads(text) for text in exchange(json.dumps(said), mesh)]
    for outcome in outcomes:
        if "error" in outcome:
            raise _named(outcome["error"])(outcome["text"]) from cause
    return [outcome["result"] for outcome in outcomes]


def on_first(what: str, work: Callable[[], Any], mesh: Mesh) -> Any:
    """Rank 0's result of work that rank 0 alone does, on every rank."""
    return together(what, work if mesh.everyone.rank == 0 else lambda: None, mesh)[0]


def exchange(text: str, mesh: Mesh) -> list[str]:
    """Every rank's text on every rank of the mesh."""
    return [text] if mesh.everyone.size == 1 else mesh.world.gather_texts(text)


def reason(error: OSError, said: str) -> str:
    """The operating system's words, with the file they concern where ``said`` does not name it."""
    words = error.strerror or str(error)
    named = error.filename is not None and str(error.filename) not in said
    return f"{words} ({error.filename})" if named else words


def _named(name: str) -> type[MpmpError]:
    return next(kind for kind in AGREED if kind.__name__ == name)
