"""Floor 1: bytes between ranks. The only room that imports mpi4py, in ``mpi.py``."""
