"""What the tests are run with: jobs of ranks (launch), and rank tests inside pytest (plugin)."""

from harness.launch import MPI_LIBRARY, ROOT, Job, Run, run_ranks

__all__ = ["MPI_LIBRARY", "ROOT", "Job", "Run", "run_ranks"]
