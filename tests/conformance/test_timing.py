"""The conformance tests that compare times: where a step's time goes, and what is said to bind it."""

from __future__ import annotations

import re

import pytest
from launching import HOROVOD_MPIRUN, LOCAL, MPI, TORCH, run


@pytest.mark.slow
@pytest.mark.parametrize(("launch", "ranks"), [(LOCAL, 1), (TORCH, 2), (MPI, 2), (HOROVOD_MPIRUN, 2)], ids=str)
def test_what_takes_the_time_of_a_step_is_told(tmp_path, launch, ranks):
    how = ["--backend", launch.backend, "--log-dir", str(tmp_path), "-q", "--hvdtrain-timing", "-m", "timing"]
    ended = run(launch.argv(ranks, "-m", "hvdtrain.testing", *how), timeout_s=400)
    logs = {file.name: file.read_text() for file in sorted(tmp_path.glob("rank*.log"))}
    shown = "\n\n".join([ended.output, *(f"--- {name}\n{text[-6000:]}" for name, text in logs.items())])
    assert ended.code == 0, shown
    assert all(re.search(r"^1[0-9] passed", text, re.M) for text in logs.values()), shown
