"""Horovod's own tests of its PyTorch part, over `hvdtrain.horovod`: known.json says what became of each.

    HVDTRAIN_HOROVOD_TESTS=folder/with/test_torch.py pytest tests/horovod_own

The file is ``test/parallel/test_torch.py`` of Horovod 0.28.1. It is not part of this repository.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from launching import missing, run

HERE = Path(__file__).parent
KNOWN = json.loads((HERE / "known.json").read_text())


def test_the_list_gives_a_reason_for_all_that_does_not_pass():
    for kind in ("failing", "inapplicable"):
        assert all(KNOWN[kind].values())
    assert not set(KNOWN["failing"]) & set(KNOWN["passing"])
    assert len(KNOWN["passing"]) >= 97


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("backend", ["mpi", "torch"])
def test_what_passed_still_passes(tmp_path, backend):
    folder = os.environ.get("HVDTRAIN_HOROVOD_TESTS")
    if not folder:
        pytest.skip("HVDTRAIN_HOROVOD_TESTS names no folder with Horovod's test_torch.py")
    if backend == "mpi" and missing("mpirun", "mpi"):
        pytest.skip(missing("mpirun", "mpi"))
    out = tmp_path / "found.json"
    file = str(Path(folder) / "test_torch.py")
    ended = run([sys.executable, str(HERE / "run_theirs.py"), backend, "2", file, str(out)], timeout_s=1700)
    assert ended.code == 0, ended.output
    found = json.loads(out.read_text())
    assert sorted(found) == sorted([*KNOWN["passing"], *KNOWN["inapplicable"], *KNOWN["failing"]])
    lost = {name: found[name] for name in KNOWN["passing"] if found[name]["outcome"] != "passing"}
    assert not lost
