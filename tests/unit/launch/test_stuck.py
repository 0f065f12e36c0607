"""An mpirun that waits for a host that is gone is ended, and nothing else is."""

from __future__ import annotations

import signal
import subprocess
import time

import pytest

from hvdtrain.launch.ancestry import Ancestor, read_ancestors
from hvdtrain.launch.stuck import end_if_stuck


@pytest.fixture
def sleeper():
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process
        process.kill()


def test_a_launcher_that_stays_is_ended(sleeper):
    ancestors = [
        Ancestor(arguments=("python",), pid=1),
        Ancestor(arguments=("/opt/bin/mpirun", "-np"), pid=sleeper.pid),
    ]
    assert end_if_stuck(0.2, ancestors) == sleeper.pid
    assert sleeper.wait(timeout=10) == -signal.SIGTERM


def test_one_that_ignores_the_request_is_killed():
    with subprocess.Popen(["sh", "-c", "trap '' TERM; while true; do sleep 0.1; done"]) as process:
        time.sleep(0.2)
        end_if_stuck(0.2, [Ancestor(arguments=("prterun",), pid=process.pid)])
        assert process.wait(timeout=10) == -signal.SIGKILL


def test_a_launcher_gets_its_time_first(sleeper):
    end_if_stuck(1.5, [Ancestor(arguments=("mpirun",), pid=sleeper.pid)])
    with pytest.raises(subprocess.TimeoutExpired):
        sleeper.wait(timeout=0.8)


def test_other_programs_and_processes_that_are_gone_are_left_alone(sleeper):
    assert end_if_stuck(0.0, [Ancestor(arguments=("srun",), pid=sleeper.pid)]) is None
    with subprocess.Popen(["true"]) as gone:
        gone.wait()
    assert end_if_stuck(0.0, [Ancestor(arguments=("mpirun",), pid=gone.pid)]) is None
    assert sleeper.poll() is None


def test_ancestors_know_their_process_ids():
    import os

    assert read_ancestors()[0].pid == os.getppid()
