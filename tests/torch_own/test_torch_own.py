"""PyTorch's own tests of process groups, those inside its wheel, over the mpi4py group: known.json says what became of each."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from launching import missing, run

HERE = Path(__file__).parent
KNOWN = json.loads((HERE / "known.json").read_text())


def test_the_list_gives_a_reason_for_all_that_does_not_pass():
    for kind in ("failing", "inapplicable"):
        assert all(reason for reason in KNOWN[kind].values())
    assert not set(KNOWN["failing"]) & set(KNOWN["passing"])
    assert len(KNOWN["passing"]) > 4 * len(KNOWN["failing"])


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_what_passed_still_passes_and_nothing_else_fails(tmp_path):
    if missing("mpirun", "mpi"):
        pytest.skip(missing("mpirun", "mpi"))
    out = tmp_path / "found.json"
    # Not the inapplicable ones: some put a group of Gloo in the place of this one, and take others with them.
    wanted = sorted([*KNOWN["passing"], *KNOWN["failing"]])
    ended = run([sys.executable, str(HERE / "driver.py"), "2", str(out), *wanted], timeout_s=1700)
    assert ended.code == 0, ended.output
    found = json.loads(out.read_text())
    failing = {name: one["why"] for name, one in found.items() if one["outcome"] == "failing"}
    unknown = {name: why for name, why in failing.items() if name not in KNOWN["failing"]}
    assert not unknown
    if str(torch.__version__).startswith(KNOWN["torch"]):
        lost = [name for name in KNOWN["passing"] if found[name]["outcome"] != "passing"]
        assert not lost
