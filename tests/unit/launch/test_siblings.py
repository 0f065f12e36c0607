"""Ranks that have no process any more, told from ranks that have: real processes with a launcher's variables."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

RANKS = """
import os, subprocess, sys, time
# rank 1 lives on, rank 2 has ended, rank 3 is a zombie
def start(rank, code):
    environment = {**os.environ, "HVDTRAIN_RANK": str(rank), "HVDTRAIN_LOCAL_RANK": str(rank)}
    return subprocess.Popen([sys.executable, "-S", "-c", code], env=environment)
others = [start(1, "import time; time.sleep(60)"), start(2, ""), start(3, "")]
others[1].wait()
from hvdtrain.launch.detect import detect
from hvdtrain.launch import siblings
siblings._GONE_S = 0.3
seen = siblings.Siblings(detect())
print(seen.ended([1, 2, 3]))
end = time.monotonic() + 20
while len(seen.ended([1, 2, 3])) < 2 and time.monotonic() < end:
    time.sleep(0.1)
print(sorted(seen.alive()), seen.ended([1, 2, 3]))
others[0].kill()
"""


def rank_zero(size: int, body: str) -> str:
    environment = {
        "HVDTRAIN_RANK": "0",
        "HVDTRAIN_WORLD_SIZE": str(size),
        "HVDTRAIN_LOCAL_RANK": "0",
        "HVDTRAIN_LOCAL_WORLD_SIZE": str(size),
        "HVDTRAIN_JOB_ID": f"siblings-{time.time_ns()}",
    }
    import os

    done = subprocess.run(
        [sys.executable, "-c", body],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel must show other processes")
def test_ranks_without_a_process_are_said_to_have_ended_after_a_while():
    first, then = rank_zero(4, RANKS).splitlines()
    assert first == "[]"
    assert then == "[0, 1] [2, 3]"


def test_alone_nobody_is_looked_for():
    body = "from hvdtrain.launch.detect import detect; from hvdtrain.launch.siblings import Siblings\nprint(Siblings(detect()).ended([1]))"
    assert rank_zero(1, body).strip() == "[]"
