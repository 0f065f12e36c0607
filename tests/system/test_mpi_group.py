"""The mpi4py process group on its own: `tests/ranks` under mpirun, and plain torch scripts."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from launching import MPI, ROOT, run

RANKS = Path(__file__).resolve().parents[1] / "ranks"


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_every_operation_on_every_rank(ranks):
    options = ["-x", "-q", "-p", "no:cacheprovider", "--color=no"]
    ended = run(MPI.argv(ranks, "-m", "pytest", *options, str(RANKS)), timeout_s=240)
    assert ended.code == 0, ended.output[-8000:]
    counts = re.findall(r"(\d+) passed", ended.output)
    assert len(counts) == ranks
    assert len(set(counts)) == 1
    assert int(counts[0]) > 300
