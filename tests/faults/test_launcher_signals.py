"""A signal to the launcher's process alone: a checkpoint where the launcher allows one, an end within a bound in any case, and
nothing left behind. docs/reliability.md has the same table in words.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from importlib import metadata
from pathlib import Path

import pytest
from launching import LAUNCHERS, missing
from signalled import begin, job, wait_for_ranks

BACKENDS = {
    "torchrun": "torch",
    "mpirun": "mpi",
    "horovodrun-gloo": "horovod",
    "horovodrun-mpi": "horovod",
    "spawn": "torch",
}
GUARD = (sys.executable, "-m", "hvdtrain", "guard")
SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP", "SIGKILL")
SAVED, LOST, EITHER = "saved", "lost", "either"
END_S = 60  # steps take 0.7 s, and a rank that cannot save is killed after 30 s
KILLED = -signal.SIGKILL

# What becomes of the state, and the exit code; None for any that is not 0.
TABLE = {
    **{("guard mpirun", name): (SAVED, 75) for name in SIGNALS},
    **{("guard torchrun", name): (SAVED, 75) for name in SIGNALS},
    **{("horovodrun-mpi", name): (SAVED, 75) for name in SIGNALS},
    **{("horovodrun-gloo", name): (SAVED, 75) for name in SIGNALS},
    **{("mpirun", name): (LOST, None) for name in ("SIGINT", "SIGTERM", "SIGHUP")},  # ranks get half a second
    ("mpirun", "SIGUSR1"): (SAVED, 75),
    **{("torchrun", name): (SAVED, 1) for name in ("SIGTERM", "SIGHUP")},
    ("torchrun", "SIGINT"): (EITHER, 1),
    ("torchrun", "SIGUSR1"): (EITHER, -signal.SIGUSR1),  # torchrun dies of it, and its store with it
    **{("spawn", name): (SAVED, None) for name in SIGNALS},
    ("mpirun", "SIGKILL"): (SAVED, KILLED),
    ("torchrun", "SIGKILL"): (EITHER, KILLED),
    **{(one, "SIGKILL"): (SAVED, KILLED) for one in ("guard mpirun", "guard torchrun", "horovodrun-mpi", "horovodrun-gloo")},
}  # fmt: skip
CHEAP = [("guard mpirun", "SIGTERM"), ("horovodrun-mpi", "SIGHUP")]


def built_for_signals() -> bool:
    """Whether the installed Horovod has the edits of its runner."""
    stamp = Path(str(metadata.distribution("horovod").locate_file("horovod"))) / "hvdtrain_build.json"
    return stamp.exists() and {"guard", "mpirun-instead"} <= set(json.loads(stamp.read_text())["edits"])


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize(
    ("launcher", "name"), [cell if cell in CHEAP else pytest.param(*cell, marks=pytest.mark.slow) for cell in TABLE]
)
def test_a_signal_to_the_launcher_is_a_checkpoint_or_an_end_and_leaves_nothing(tmp_path, launcher, name):
    state, code = TABLE[launcher, name]
    kind = launcher.removeprefix("guard ")
    reason = missing(kind, BACKENDS[kind])
    if reason:
        pytest.skip(reason)
    if kind.startswith("horovodrun") and not built_for_signals():
        pytest.skip("the Horovod here was built before its runner was edited (hvdtrain install-horovod)")
    with job(kind, BACKENDS[kind], tmp_path, before=GUARD if launcher != kind else ()) as running:
        running.wait_until_training()
        running.send(signal.Signals[name])
        running.finish(END_S, END_S)
        assert running.left == [], running.output
        assert running.code not in (0, None), running.output
        if code is not None:
            assert running.code == code, running.output
        if state == SAVED:
            assert running.saved() == running.steps(), running.output
        if code == 75:
            assert "exit code 75" in running.output  # some launchers end with a code of their own
        if state == LOST:
            assert running.saved() == 0


ENDING = """
import os, sys, time
import torch
import hvdtrain
with hvdtrain.init("mpi", device="cpu", timeout_s=4) as backend:
    backend.all_reduce(torch.ones(1))
    print("rank", os.getpid(), flush=True)
    while not os.path.exists(sys.argv[1]):
        time.sleep(0.05)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_an_mpirun_that_stands_still_does_not_keep_ranks_that_are_done(tmp_path):
    reason = missing("mpirun", "mpi")
    if reason:
        pytest.skip(reason)
    running = begin(tmp_path, LAUNCHERS["mpirun"](2, "-u", "-c", ENDING, str(tmp_path / "end")))
    try:
        ranks = wait_for_ranks(running, 2, 60)
        running.send(signal.SIGSTOP)
        (tmp_path / "end").touch()  # the ranks come to MPI_Finalize, which waits for mpirun
        end = time.monotonic() + 40
        while set(ranks) & set(running.members()):
            assert time.monotonic() < end, "ranks wait for a launcher that stands still"
            time.sleep(0.2)
    finally:
        running.end()
