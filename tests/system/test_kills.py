"""Whole runs that save each step, killed at any moment and begun again: nothing lost, and bit for bit the same end.

HVDTRAIN_TEST_KILLS=N sets the number of kills of the slow tests.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
from killed_runs import FLAGS, Watcher, finished, kill_all, records
from launching import ENVIRONMENT, HOROVOD_GLOO, MPI, ROOT, TORCH, run


def kills(default: int) -> int:
    return int(os.environ.get("HVDTRAIN_TEST_KILLS", default))


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("number", [3, pytest.param(kills(1000), marks=pytest.mark.slow)])
def test_a_run_that_is_killed_again_and_again_loses_nothing(tmp_path: Path, number: int):
    script = Path(__file__).with_name("killed_runs.py")
    ended = run([sys.executable, str(script), str(tmp_path), str(number), str(number)], timeout_s=7000)
    assert ended.code == 0, ended.output
    print(ended.output)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("launch", [TORCH, MPI, HOROVOD_GLOO], ids=str)
def test_a_job_of_two_ranks_that_is_killed_again_and_again_loses_nothing(tmp_path: Path, launch):
    whole = run(launch.hvdtrain(2, *FLAGS, "--run-dir", str(tmp_path / "whole")))
    assert whole.code == 0, whole.output
    chance, done, number, mark = random.Random(0), 0, 0, f"HVDTRAIN_TEST_MARK={uuid.uuid4()}"
    while done < kills(50):
        folder, number = tmp_path / str(number), number + 1
        watcher = Watcher(folder)
        while finished(folder) is None:
            with (tmp_path / "output").open("w") as output:
                job = subprocess.Popen(
                    launch.hvdtrain(2, *FLAGS, "--run-dir", str(folder)),
                    cwd=ROOT,
                    env={**os.environ, **ENVIRONMENT, mark.partition("=")[0]: mark.partition("=")[2]},
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                )
                before, end = records(folder), time.monotonic() + 120
                while job.poll() is None and records(folder) == before and time.monotonic() < end:
                    time.sleep(0.02)
                time.sleep(chance.uniform(0, 1))
                done += job.poll() is None
                killed = kill_all(mark)
                code = job.wait()
            assert killed or code == 0, (tmp_path / "output").read_text()
            watcher.look()
        assert finished(folder) == finished(tmp_path / "whole")
    print(f"{launch}: {done} kills, {number} runs, all as the uninterrupted one")
