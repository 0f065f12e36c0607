"""What `make dist` builds: the wheel, where nothing of this repository can be imported, trains and passes the conformance suite.

A part of the suite, which needs each of the wheel's folders; the workflow of GitHub's runs all of it, in an empty environment.
"""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path

import pytest
from launching import ROOT, run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def test_the_wheel_by_itself_trains_and_passes_the_suite(tmp_path):
    pytest.importorskip("build", reason="needs build (pip install build)")
    built = run([sys.executable, "-m", "build", "--outdir", str(tmp_path / "dist"), str(ROOT)], cwd=tmp_path)
    assert built.code == 0, built.output
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    empty = tmp_path / "empty"
    made = run([sys.executable, "-m", "venv", "--without-pip", str(empty)])
    assert made.code == 0, made.output
    python = str(empty / "bin" / "python")
    site = next(empty.glob("lib/python*/site-packages"))
    packages = sysconfig.get_path("purelib")
    installed = run(
        [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--no-compile",
            "--target",
            str(site),
            str(wheel),
        ]
    )
    assert installed.code == 0, installed.output
    # Packages that it needs are found where they are; an editable install of this repository there is not, because
    # files that end in .pth count in an environment's own folder alone.
    (site / "needed.pth").write_text(packages + "\n")
    where = run([python, "-c", "import hvdtrain; print(hvdtrain.__file__)"], cwd=tmp_path, PYTHONPATH="")
    assert Path(where.output.strip()).is_relative_to(site), where.output
    trained = run(
        [python, "-m", "hvdtrain", "--epochs", "1", "--run-dir", str(tmp_path / "run")], cwd=tmp_path, PYTHONPATH=""
    )
    assert trained.code == 0, trained.output
    suite = [
        python,
        "-m",
        "hvdtrain.testing",
        "--backend",
        "local",
        "-q",
        "-k",
        "test_trainer or test_checkpoints or test_nn",
    ]
    tried = run(suite, cwd=tmp_path, timeout_s=1200, PYTHONPATH="")
    assert tried.code == 0, tried.output
