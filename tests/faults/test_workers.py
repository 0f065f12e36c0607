"""Loader processes that do not answer end with their rank, however it ends, and hold no launcher up."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest
from launching import HOROVOD_GLOO, HOROVOD_MPI, LAUNCHERS, MPI, TORCH
from signalled import begin, wait_for_ranks

SCRIPT = str(Path(__file__).with_name("worker_job.py"))
ENDS = {"done": 0, "raise": 1, "exit": 3, "hard": 3, "wait": -signal.SIGKILL}
GONE_S = 60  # a stalled sample takes 600 s, and a stopped process for ever

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel as Linux is asked")

CELLS = [
    (state, end, start) for state in ("stalled", "stopped") for end in ENDS for start in ("fork", "spawn", "forkserver")
]
CHEAP = [("stopped", "wait", "fork"), ("stopped", "raise", "fork"), ("stalled", "hard", "forkserver")]


@pytest.mark.parametrize(
    ("state", "end", "start"),
    [cell if cell in CHEAP else pytest.param(*cell, marks=pytest.mark.slow) for cell in CELLS],
)
def test_a_loader_process_that_does_not_answer_ends_with_its_rank(tmp_path, state, end, start):
    job = begin(tmp_path, [sys.executable, SCRIPT, state, end, start])
    try:
        (rank,) = wait_for_ranks(job, 1)
        if end == "wait":
            os.kill(rank, signal.SIGKILL)
        job.finish(GONE_S, GONE_S)
        assert (job.code, job.left) == (ENDS[end], []), job.output
    finally:
        job.end()


def test_loader_processes_outlive_the_thread_that_began_them(tmp_path):
    job = begin(tmp_path, [sys.executable, SCRIPT, "its own", "wait", "fork"])
    try:
        (rank,) = wait_for_ranks(job, 1)
        time.sleep(1)
        assert len(job.members()) >= 2  # the rank, and the loader process that is inside its sample
        os.kill(rank, signal.SIGKILL)
        job.finish(GONE_S, GONE_S)
        assert job.left == []
    finally:
        job.end()


@pytest.mark.slow
@pytest.mark.parametrize("launch", [TORCH, MPI, HOROVOD_GLOO, HOROVOD_MPI], ids=str)
@pytest.mark.parametrize("state", ["stalled", "stopped"])
@pytest.mark.parametrize("end", ["raise", "exit", "wait"])
def test_no_launcher_waits_for_a_loader_process_of_a_rank_that_has_ended(tmp_path, launch, state, end):
    launch.argv(2)  # skips what is not here
    job = begin(tmp_path, LAUNCHERS[launch.launcher](2, SCRIPT, state, end, "fork", launch.backend))
    try:
        ranks = wait_for_ranks(job, 2)
        if end == "wait":
            os.kill(ranks[0], signal.SIGKILL)
        job.finish(60, 60)
        assert job.code not in (0, None), job.output
        assert job.left == []
    finally:
        job.end()
