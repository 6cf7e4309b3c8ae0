"""What a user can do wrong, and the exit code each mistake ends the job with.

An error names the rule, the numbers and the way out in one sentence. It is raised on every rank
alike where every rank can know it; the one handler in ``comm/ending.py`` prints it once and ends
the job with its code.
"""

from __future__ import annotations


class MpmpError(Exception):
    """Any error of ours; ``exit_code`` is what the job ends with."""

    exit_code = 1


class ConfigError(MpmpError):
    """A setting that is unknown, of the wrong type or out of range."""

    exit_code = 2


class TensorError(MpmpError):
    """A tensor that cannot go into a collective: its dtype, its strides, its length."""

    exit_code = 2


class ProgramError(MpmpError):
    """A collective or a schedule that cannot work: the rank, the round and the reason."""

    exit_code = 2


class LayoutError(MpmpError):
    """A layout that does not fit the ranks that were started, or the model."""

    exit_code = 3


class InputOutputError(MpmpError):
    """A file that is missing, unreadable or cannot be written."""

    exit_code = 74


class LaunchError(MpmpError):
    """The ranks were not started as one job, or MPI cannot be loaded."""

    exit_code = 3


class PeerError(MpmpError):
    """A peer left, failed or did not answer within the time limit."""

    exit_code = 76


class NotFiniteError(MpmpError):
    """A loss or gradient norm that is infinite or not a number."""

    exit_code = 77


class CheckpointError(MpmpError):
    """A checkpoint that is damaged, foreign or newer than this program."""

    exit_code = 78


class VerifyError(MpmpError):
    """A layout whose numbers are not those of one process."""

    exit_code = 1
