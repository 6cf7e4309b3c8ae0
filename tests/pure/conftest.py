"""What must be settled before the tests of one process run.

Triton decides at its import how it runs: its own functions are for its interpreter only if that is
asked for then, and torch imports it whenever it likes. Jobs that tests start must not inherit the
wish. Examples of hypothesis have no time limit: a slow machine is no fault of the code.
"""

from __future__ import annotations

import importlib.util
import os

from hypothesis import settings

settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")

if importlib.util.find_spec("triton") is not None:
    os.environ["TRITON_INTERPRET"] = "1"
    import triton.language  # noqa: F401

    del os.environ["TRITON_INTERPRET"]
