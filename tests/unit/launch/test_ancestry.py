"""The process tree, with real processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hvdtrain.launch.ancestry import Ancestor, read_ancestors

pytestmark = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="no /proc on this system")

SHOW = (
    "import json; from hvdtrain.launch.ancestry import read_ancestors as r; "
    "print(json.dumps([[a.program, (a.environ or {}).get('MARK')] for a in r()]))"
)


def test_parents_are_found_nearest_first_with_the_environment_they_were_started_with() -> None:
    shell = f"MARK=child '{sys.executable}' -c \"{SHOW}\"; true"
    ended = subprocess.run(
        ["bash", "-c", 'MARK=inner bash -c "$1"; true', "outer", shell],
        env={**os.environ, "MARK": "outer"},
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    found = json.loads(ended.stdout)
    assert found[:2] == [["bash", "inner"], ["bash", "outer"]]
    assert found[2][1] is None  # this process, which has no such variable


def test_the_walk_ends_at_the_first_process() -> None:
    assert 0 < len(read_ancestors()) <= 64


@pytest.mark.skipif(os.getuid() == 0, reason="nothing is hidden from root")
def test_a_parent_that_hides_its_environment_is_named_and_passed_over() -> None:
    hide = "import ctypes, subprocess, sys; ctypes.CDLL(None).prctl(4, 0); subprocess.run(sys.argv[1:], check=True)"
    code = "import json; from hvdtrain.launch.ancestry import read_ancestors as r; print(json.dumps([a.environ is None for a in r()]))"
    argv = [sys.executable, "-c", hide, sys.executable, "-c", code]  # 4: PR_SET_DUMPABLE
    ended = subprocess.run(argv, capture_output=True, text=True, timeout=30, check=True)
    assert json.loads(ended.stdout)[:2] == [True, False]


def test_options_are_read_from_the_command_line() -> None:
    proxy = Ancestor(arguments=("/usr/bin/hydra_pmi_proxy", "--control-port", "host1:4711", "--pgid"))
    assert proxy.program == "hydra_pmi_proxy"
    assert proxy.option("--control-port") == "host1:4711"
    assert proxy.option("--pgid") is None
    assert Ancestor().program == ""


@pytest.mark.parametrize(
    ("title", "step"),
    [
        ("slurmstepd: [12.0]", "0"),
        ("slurmstepd: [12.batch]", "batch"),
        ("slurmstepd: [12.interactive]", "interactive"),
        ("slurmstepd: [12_3+1.7]", "7"),
        ("slurmstepd", None),
        ("bash", None),
    ],
)
def test_slurms_process_is_known_by_its_title(title: str, step: str | None) -> None:
    assert Ancestor(arguments=(title,)).slurm_step == step
