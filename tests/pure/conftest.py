"""Triton is imported here, before any test may do so, because it decides then how it runs.

Its own functions are for its interpreter only if that is asked for at their import; torch imports it
whenever it likes. Jobs that tests start must not inherit the wish.
"""

from __future__ import annotations

import importlib.util
import os

if importlib.util.find_spec("triton") is not None:
    os.environ["TRITON_INTERPRET"] = "1"
    import triton.language  # noqa: F401

    del os.environ["TRITON_INTERPRET"]
