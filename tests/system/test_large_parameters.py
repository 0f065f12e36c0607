"""Parameters of more than 2^31 elements, which 32-bit counts cannot say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from launching import HOROVOD_MPIRUN, LOCAL, MPI, TORCH, run

JOB = str(Path(__file__).with_name("large_parameter_job.py"))
PLACES = 5

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def free_gib():
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) / 2**20


def said(launch, ranks, needs_gib, *what):
    if (free := free_gib()) < needs_gib:
        pytest.skip(f"needs {needs_gib} GiB of free memory, and there are {free:.0f}")
    ended = run(launch.argv(ranks, JOB, *what), timeout_s=900)
    assert ended.code == 0, ended.output
    everyone = json.loads(next(line[line.index("[{") :] for line in ended.output.splitlines() if "[{" in line))
    assert len(everyone) == ranks
    return everyone


@pytest.mark.parametrize("launch", [TORCH, MPI, HOROVOD_MPIRUN], ids=str)
def test_every_element_is_summed_and_copied(launch):
    expected = {
        "summed": [3 * number for number in range(1, 6)],
        "frozen": [3] * PLACES + [pytest.approx(1 - 0.1 * 3 * number) for number in range(1, 6)],
    }
    for found in said(launch, 2, 14, "summed", "frozen"):
        assert found == expected


@pytest.mark.parametrize(("launch", "ranks", "needs_gib"), [(LOCAL, 1, 14), (TORCH, 2, 44), (MPI, 2, 30)], ids=str)
def test_every_element_is_trained(launch, ranks, needs_gib):
    for found in said(launch, ranks, needs_gib, "trained"):
        assert found == {"trained": [8 - number * ranks for number in range(1, 6)]}
