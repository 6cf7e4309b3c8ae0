"""Ground floor: parallel algorithms as short programs, one per rank. No torch, no MPI."""
