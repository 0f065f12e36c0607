"""Runs a job in which one rank goes wrong, and says how it ended and what it left behind."""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from launching import LAUNCHERS, Ended, missing, run

JOB = str(Path(__file__).with_name("matrix_job.py"))
TIMEOUT_S = 8
STARTUP_S = 120  # of two ranks on a busy machine


@dataclass(frozen=True)
class Outcome:
    """How a job ended.

    Attributes:
        ended: Its code and all of its output.
        seconds: From the fault to the end of the launcher.
        left: What is still there afterwards: processes and temporary files.
    """

    ended: Outcome | Ended
    seconds: float
    left: list[str]


def end_of(
    launcher: str,
    backend: str,
    fault: str,
    culprit: int,
    moment: str,
    folder: Path,
    environment: dict[str, str] | None = None,
) -> Outcome:
    """Run the job to its end, in a temporary folder of its own."""
    reason = missing("python" if launcher == "spawn" else launcher, backend)
    if reason:
        pytest.skip(reason)
    words = (JOB, fault, str(culprit), moment, str(TIMEOUT_S), backend, str(folder))
    temporary = tempfile.mkdtemp(prefix="hf-")  # short: it will hold a socket
    try:
        argv = [sys.executable, JOB, "spawn", *words[1:]] if launcher == "spawn" else LAUNCHERS[launcher](2, *words)
        ended = run(argv, timeout_s=STARTUP_S + 60, cwd=folder, **{**(environment or {}), "TMPDIR": temporary})
        now = time.time()
        noted = folder / "fault"
        seconds = now - float(noted.read_text()) if noted.exists() else float("nan")
        return Outcome(ended, seconds, left_behind(temporary))
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def left_behind(temporary: str) -> list[str]:
    """Processes that were started with this temporary folder, and files of ours in it; waits a little for their end."""
    for _ in range(100):
        left = [*_processes(temporary), *map(str, Path(temporary).glob("hvdtrain-*/*"))]
        if not left:
            return []
        time.sleep(0.1)
    return left


def _processes(temporary: str) -> list[str]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes()
            if temporary.encode() in words or f"TMPDIR={temporary}".encode() in (folder / "environ").read_bytes():
                found.append(f"process {folder.name}: {words.replace(bytes(1), b' ').decode(errors='replace')[:300]}")
        except OSError:
            continue
    return found


def names(output: str, rank: int) -> bool:
    """Whether what is read says which rank it was: ours, or the launcher's own words."""
    own = rf"rank {rank} (on \S+ (died|ended|failed|has left the program)|of 2 (failed|ended))|missing: rank {rank} (on|.never heard of)|for rank {rank}'s address"
    mpirun = rf"process rank {rank} with PID|Process name: \[[^\]]*,{rank}\]"
    torchrun = rf"rank\s*: {rank} \(local_rank: {rank}\)"
    horovodrun = rf"Process name: {rank}\b"
    srun = rf"task {rank}: Exited with exit code 3"  # a victim's is 1
    return re.search("|".join((own, mpirun, torchrun, horovodrun, srun)), output) is not None
