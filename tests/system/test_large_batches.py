"""LAMB and LARS of pytorch-optimizer do on every engine what they do in one process, clipped and accumulated."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from launching import HOROVOD_MPI, LOCAL, MPI, TORCH, run

JOB = str(Path(__file__).with_name("large_batch_job.py"))


@pytest.mark.parametrize(
    ("launch", "ranks"),
    [(MPI, 2), *(pytest.param(launch, n, marks=pytest.mark.slow) for launch, n in ((LOCAL, 1), (TORCH, 3), (HOROVOD_MPI, 2)))],
    ids=str,
)  # fmt: skip
def test_they_train_as_in_one_process(launch, ranks):
    pytest.importorskip("pytorch_optimizer", reason="pytorch-optimizer is not installed")
    ended = run(launch.argv(ranks, JOB, launch.backend))
    assert ended.code == 0, ended.output
    everyone = json.loads(next(line[line.index("[{") :] for line in ended.output.splitlines() if "[{" in line))
    assert len(everyone) == ranks
    for said in everyone:
        for kind in ("Lamb", "LARS"):
            assert said[kind]["difference"] < 1e-12
            assert said[kind]["moved"] > 1e-3
            assert said[kind]["clipped"] > 3
            assert (
                "look at a parameter as a whole" in said[kind]["sharded"]
            )  # its trust ratios are norms of whole parameters
