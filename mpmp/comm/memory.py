"""What becomes of memory that a process gives back: kept for the next step, not for the system.

Each training step takes and gives back the same activations. glibc's malloc returns them to the
system whenever enough is free, and gets them again page by page, each filled with zeros by the
kernel: 15,800 pages of a step on one thread, 4 with this; what that gains in time was within noise
(docs/log.md).
"""

from __future__ import annotations

import ctypes
import os

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # as in malloc.h
_KEPT_BYTES = 1 << 30


def keep_freed() -> None:
    """Let malloc keep what is freed, up to a GiB, unless the user has told it something else."""
    told = any(name.startswith("MALLOC_") for name in os.environ)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or told or "malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return
    # Older glibc takes at most 32 MiB here; a trim threshold alone would leave this one at 128 KiB.
    for most in (_KEPT_BYTES, 32 << 20):
        if mallopt(_MMAP_THRESHOLD, most):
            mallopt(_TRIM_THRESHOLD, _KEPT_BYTES)
            return
