"""Horovod's own tests of its PyTorch part, over `hvdtrain.horovod`: known.json says what became of each.

    HVDTRAIN_HOROVOD_TESTS=folder/with/test_torch.py/and/test_torch_elastic.py pytest tests/horovod_own

The files are ``test/parallel/test_torch.py`` and ``test/single/test_torch_elastic.py`` of Horovod 0.28.1. They are not part of this
repository.
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


def found_over(backend: str, ranks: int, name: str, out: Path) -> dict[str, dict[str, str]]:
    folder = os.environ.get("HVDTRAIN_HOROVOD_TESTS")
    if not folder or not (Path(folder) / name).exists():
        pytest.skip(f"HVDTRAIN_HOROVOD_TESTS names no folder with Horovod's {name}")
    if backend == "mpi" and missing("mpirun", "mpi"):
        pytest.skip(missing("mpirun", "mpi"))
    argv = [sys.executable, str(HERE / "run_theirs.py"), backend, str(ranks), str(Path(folder) / name), str(out)]
    ended = run(argv, timeout_s=1700)
    assert ended.code == 0, ended.output
    return json.loads(out.read_text())


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("backend", ["mpi", "torch"])
def test_what_passed_still_passes(tmp_path, backend):
    found = found_over(backend, 2, "test_torch.py", tmp_path / "found.json")
    assert sorted(found) == sorted([*KNOWN["passing"], *KNOWN["inapplicable"], *KNOWN["failing"]])
    lost = {name: found[name] for name in KNOWN["passing"] if found[name]["outcome"] != "passing"}
    assert not lost


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["mpi", "torch"])
def test_the_elastic_ones_still_pass(tmp_path, backend):
    known = KNOWN["elastic"]
    found = found_over(backend, known["ranks"], "test_torch_elastic.py", tmp_path / "found.json")
    assert {name: one["outcome"] for name, one in found.items()} == dict.fromkeys(known["passing"], "passing")
