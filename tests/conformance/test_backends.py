"""Runs the conformance suite (`hvdtrain.testing`) under the real launchers, once per backend and world size."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from launching import HOROVOD_GLOO, HOROVOD_MPI, HOROVOD_MPIRUN, LOCAL, MPI, TORCH, run

from hvdtrain.testing import features

PAGE = (Path(__file__).parents[2] / "docs" / "compatibility.md").read_text()
SHARES = {"all": [], "brief": ["--brief"], "sample": ["--brief", "--sample", "3"]}
LAUNCHES = [
    (LOCAL, 1, "all"),
    # Of tests that take long, each engine runs others of their parameters; `make test-all` runs all on each.
    *[(launch, 3, "brief") for launch in (TORCH, MPI)],
    # Gradients leave as on mpi, by hooks; each test runs with some of its parameters.
    (HOROVOD_MPIRUN, 3, "sample"),
    *[pytest.param(launch, 3, "all", marks=pytest.mark.slow) for launch in (TORCH, MPI, HOROVOD_MPIRUN)],
    # A world of one is the same code on every engine. Two and four ranks find what three find: three is the number whose shares are unequal and whose sums must round.
    *[pytest.param(launch, 2, "all", marks=pytest.mark.slow) for launch in (TORCH, MPI, HOROVOD_MPIRUN)],
    *[pytest.param(launch, 1, "all", marks=pytest.mark.slow) for launch in (TORCH, MPI, HOROVOD_MPIRUN)],
    *[pytest.param(launch, 4, "all", marks=pytest.mark.slow) for launch in (TORCH, MPI, HOROVOD_MPIRUN)],
    *[pytest.param(HOROVOD_GLOO, ranks, "all", marks=pytest.mark.slow) for ranks in (2, 3, 4)],
    *[pytest.param(HOROVOD_MPI, ranks, "all", marks=pytest.mark.slow) for ranks in (2, 3, 4)],
]


@pytest.mark.parametrize(("launch", "ranks", "share"), LAUNCHES, ids=str)
def test_the_backend_keeps_every_promise(tmp_path, launch, ranks, share):
    record = tmp_path / "record.json"
    how = ["--backend", launch.backend, "--log-dir", str(tmp_path), "--record", str(record), "-q"]
    how += SHARES[share]
    argv = launch.argv(ranks, "-m", "hvdtrain.testing", *how)
    ended = run(argv, timeout_s=480)
    logs = {file.name: file.read_text() for file in sorted(tmp_path.glob("rank*.log"))}
    shown = "\n\n".join([ended.output, *(f"--- {name}\n{text[-6000:]}" for name, text in logs.items())])
    assert ended.code == 0, shown
    assert len(logs) == ranks
    counts = {
        int(found[1]) for text in logs.values() for found in [re.search(r"^(\d+) passed in", text, re.M)] if found
    }
    assert len(counts) == 1, shown
    assert counts.pop() > 250
    found = features.Record.read(record)
    if ranks > 1 or launch.backend == "local":
        assert {feature: found.cell(feature) for feature in features.FEATURES} == features.cells_in(
            PAGE, launch.backend
        )


def test_the_page_says_what_excludes_what():
    assert features.exclusions() in PAGE
