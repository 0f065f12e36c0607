"""Compiled models train to the same parameters, go on after a resume, and keep their names, on every engine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from launching import horovodrun_mpi, mpirun, python, run, torchrun

JOB = str(Path(__file__).with_name("compile_job.py"))
LAUNCHES = {"python": (python, 1), "torchrun": (torchrun, 2), "mpirun": (mpirun, 2), "horovodrun": (horovodrun_mpi, 2)}


@pytest.mark.parametrize(
    ("launcher", "compiler"),
    [
        ("torchrun", "aot_eager"),
        *(pytest.param(name, "aot_eager", marks=pytest.mark.slow) for name in ("python", "mpirun", "horovodrun")),
        pytest.param("torchrun", "inductor", marks=pytest.mark.slow),
    ],
)
def test_a_compiled_model_trains_as_it_would_otherwise(launcher: str, compiler: str) -> None:
    if launcher == "horovodrun":
        pytest.importorskip("horovod", reason="Horovod is not installed")
    launch, ranks = LAUNCHES[launcher]
    ended = run(launch(ranks, JOB, compiler))
    assert ended.code == 0, ended.output
    everyone = json.loads(next(line[line.index("[{") :] for line in ended.output.splitlines() if "[{" in line))
    assert len(everyone) == ranks
    for said in everyone:
        assert max(said["differences"]) < 1e-12
        assert max(said["losses"]) - min(said["losses"]) < 1e-12
        assert said["graphs"] > 0
        assert (said["names"], said["breaks"], said["own_copy"]) == (True, 0, True)
