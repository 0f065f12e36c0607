"""Every exception that hvdtrain raises on purpose.

::

    HvdtrainError
    ├── ConfigError          a flag, a YAML key or an argument is wrong          (exit code 2)
    ├── LaunchError          the launcher's environment is incomplete or contradictory (exit code 2)
    ├── BackendUnavailable   the engine is not installed, or cannot run under this launcher (exit code 2)
    ├── DataError            a data set is missing, broken or could not be downloaded
    ├── CheckpointError      a checkpoint could not be written, or does not fit
    ├── OutputError          a file of the run's folder could not be written
    ├── CollectiveError      a collective was called wrongly, differently on some ranks, or timed out
    │   └── HorovodInternalError  the same, of Horovod's API (`hvdtrain.horovod`)
    ├── ModelMismatch        the ranks do not hold the same model or optimizer
    ├── TrainingError        the training itself went wrong
    │   └── NonFiniteLoss    the loss became NaN or infinite
    ├── RankFailure          another rank failed; carries that rank and its traceback
    └── Preempted            the run was asked to end, saved its state and did   (exit code 75)

Messages say what failed, with the value, and what to do next.
"""

from __future__ import annotations


class HvdtrainError(Exception):
    """Base of all exceptions raised on purpose.

    Attributes:
        exit_code: What the command line ends with.
        first: Set when this error ended a job of ranks and this rank was the first that failed: the one that speaks.
    """

    exit_code = 1
    first = False


class ConfigError(HvdtrainError, ValueError):
    """A flag, a YAML key or an argument has a value that cannot work."""

    exit_code = 2


class LaunchError(HvdtrainError):
    """The launcher's environment is half set, contradictory, or cannot carry this job."""

    exit_code = 2


class BackendUnavailable(HvdtrainError):
    """The engine asked for is not installed, or cannot run under this launcher."""

    exit_code = 2


class DataError(HvdtrainError):
    """A data set is missing, broken, or could not be downloaded."""


class CheckpointError(HvdtrainError):
    """A checkpoint could not be written, is damaged, or does not fit this run."""


class OutputError(HvdtrainError):
    """A file of the run's folder could not be written (its summary, its configuration)."""


class CollectiveError(HvdtrainError):
    """A collective got an argument it cannot take, differed between ranks, or timed out."""


class HorovodInternalError(CollectiveError, RuntimeError):
    """An operation of Horovod's API failed: on some ranks it was called differently or not at all, or the engine failed."""


class ModelMismatch(HvdtrainError):
    """The ranks do not hold the same parameters, buffers or optimizer."""


class TrainingError(HvdtrainError):
    """The training itself went wrong."""


class NonFiniteLoss(TrainingError):
    """The loss became NaN or infinite."""


class RankFailure(HvdtrainError):
    """Another rank failed first.

    Args:
        message: One line that says what happened.
        rank: The rank that failed first, or None when it is not known.
        rank_traceback: That rank's formatted traceback, or "" when there is none.
    """

    def __init__(self, message: str, *, rank: int | None = None, rank_traceback: str = "") -> None:
        super().__init__(message)
        self.rank = rank
        self.rank_traceback = rank_traceback


class Preempted(HvdtrainError):
    """The run was asked to end (SIGTERM), wrote a checkpoint and stopped.

    Exit code 75 is EX_TEMPFAIL of sysexits.h: try again later.
    """

    exit_code = 75
