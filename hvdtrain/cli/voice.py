"""What the command line says, once, however many ranks say it.

Rank 0 speaks at once. The others wait: when rank 0 has failed in the same way the launcher ends them meanwhile. One
that is still there afterwards failed for a reason of its own (a file that its host lacks), and says so.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TextIO

from hvdtrain.errors import HvdtrainError, LaunchError, OutputError, Preempted, RankFailure
from hvdtrain.launch.detect import detect

GRACE_S = 3.0
"""How long other ranks leave rank 0 to speak before they end: a launcher ends the job at the first rank that fails."""


def say(text: str) -> None:
    """Writes ``text`` and a newline to the standard output, on rank 0 only.

    Raises:
        OutputError: It cannot be written; a reader that has gone is no error.
    """
    _write(lambda out: out.write(text + "\n"))


def show(content: bytes) -> None:
    """Writes bytes to the standard output as they are, whatever its encoding; as `say` does otherwise."""
    _write(lambda out: out.buffer.write(content))


def _write(content: Callable[[TextIO], object]) -> None:
    if rank() != 0 or sys.stdout is None:  # None: it was closed before Python began (>&-)
        return
    try:
        content(sys.stdout)
        sys.stdout.flush()
    except OSError as error:
        with suppress(OSError):  # what is still to be written, Python would complain of at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):  # `hvdtrain --help | head`: the reader has gone
            raise OutputError(f"could not write to the standard output: {error.strerror}; free space there") from error


def complain(error: BaseException, *, same_everywhere: bool) -> None:
    """Writes one message for ``error`` to the standard error.

    Args:
        error: Its text says what failed, the value and the remedy.
        same_everywhere: All ranks are sure to have met the same error, so that only rank 0 need tell.
    """
    own_rank = rank()
    if own_rank != 0 and isinstance(error, Preempted):  # all ranks agreed to stop; rank 0 says so
        return
    if own_rank != 0 and not (isinstance(error, HvdtrainError) and error.first):
        time.sleep(GRACE_S)
        if same_everywhere:
            return
    who = f"rank {own_rank}: " if own_rank else ""
    what = "" if isinstance(error, Preempted) else "error: "
    trace = f"\n{error.rank_traceback.rstrip()}" if isinstance(error, RankFailure) and error.rank_traceback else ""
    code = (
        f"; exit code {error.exit_code}" if isinstance(error, Preempted) else ""
    )  # which some launchers do not pass on
    sys.stderr.write(f"hvdtrain: {what}{who}{error}{code}{trace}\n")
    sys.stderr.flush()


def interrupted() -> None:
    """Writes that Ctrl-C ended the command, on rank 0 only."""
    if rank() == 0:
        sys.stderr.write("hvdtrain: interrupted\n")


def rank() -> int:
    """This process's rank as the launcher tells it; 0 when that cannot be made out, so that somebody speaks."""
    try:
        return detect().topology.rank
    except LaunchError:
        return 0
