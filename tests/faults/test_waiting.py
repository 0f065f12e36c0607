"""A rank stops or dies while others wait for it in blocking all-reduces of the mpi4py group, which they perform themselves."""

from __future__ import annotations

from pathlib import Path

import pytest
from launching import MPI, run

JOB = str(Path(__file__).with_name("waiting_job.py"))
TIMEOUT_S = 6
_BOUND_S = 90  # of start, time-out and end on a busy machine; nothing else would end these jobs


def job(fault: str, size: int) -> list[str]:
    return MPI.argv(2, JOB, fault, str(size), str(TIMEOUT_S))


@pytest.mark.slow
def test_without_a_fault_all_end_well():
    ended = run(job("none", 4), timeout_s=_BOUND_S)
    assert ended.code == 0, ended.output
    assert ended.output.count("done") == 2


@pytest.mark.parametrize(
    ("fault", "size"), [("stop", 4), pytest.param("stop", 2**18, marks=pytest.mark.slow), ("stop-inside", 2**18)]
)
def test_a_rank_that_was_stopped_is_named_within_the_time_out_and_all_end(fault, size):
    ended = run(job(fault, size), timeout_s=_BOUND_S)
    assert ended.code != 0
    assert f"timed out after {TIMEOUT_S} s" in ended.output, ended.output
    assert "missing: rank 1" in ended.output, ended.output
    assert "done" not in ended.output


@pytest.mark.parametrize("size", [4, pytest.param(2**18, marks=pytest.mark.slow)])
def test_a_rank_that_was_killed_ends_all(size):
    ended = run(job("kill", size), timeout_s=_BOUND_S)
    assert ended.code != 0
    assert "done" not in ended.output
