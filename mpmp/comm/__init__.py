"""Floor 1: bytes between ranks. The only room that imports mpi4py."""

import mpi4py

# Importing mpi4py.MPI would otherwise start MPI, before a GPU could be chosen.
mpi4py.rc.initialize = False
mpi4py.rc.finalize = True
