"""Long work leaves threads, descriptors and memory as they were: steps, groups, starts and stops on each engine."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from launching import HOROVOD_GLOO, HOROVOD_MPI, LOCAL, MPI, TORCH, run

SCRIPT = str(Path(__file__).with_name("endurance_job.py"))
GROWTH_MB = 8  # of a resident set of some 500 MB


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("launch", [LOCAL, TORCH, MPI, HOROVOD_GLOO, HOROVOD_MPI], ids=str)
def test_nothing_grows(launch):
    ranks = 1 if launch == LOCAL else 2
    ended = run(launch.argv(ranks, SCRIPT, launch.backend, "20000", "200", "50"), timeout_s=1700)
    assert ended.code == 0, ended.output
    told = [json.loads(line) for line in re.findall(r"endurance (\{.*\})", ended.output)]
    assert {one["what"] for one in told} == {"steps", "groups"} | ({"starts"} if launch.backend != "horovod" else set())
    for one in told:
        before, after = one["before"], one["after"]
        print(launch, one)
        assert after["threads"] <= before["threads"], one
        assert after["descriptors"] <= before["descriptors"], one
        assert after["rss_mb"] <= before["rss_mb"] + GROWTH_MB, one


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_horovod_can_be_started_and_stopped_as_often_in_new_processes():
    for _ in range(50):
        ended = run(HOROVOD_GLOO.argv(2, SCRIPT, "horovod", "0", "3", "0"), timeout_s=120)
        assert ended.code == 0, ended.output
