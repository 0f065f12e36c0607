"""Runs the conformance suite on older versions of PyTorch, the oldest supported one among them, each in an environment of its own.

The environments stay beside this one (`make clean` removes both): some GB each where pip brings torch for CUDA.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from launching import HOROVOD_MPIRUN, LOCAL, MPI, ROOT, TORCH, Launch, run

from hvdtrain.testing import features

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
OLDER = ("2.4.1", "2.13.0")
PAGE = (ROOT / "docs" / "compatibility.md").read_text()
# What a version lacks that a feature needs: it is refused there by a sentence.
LACKS = {"2.4.1": {"sharded model"}}


class Setting:
    """An environment with one version of torch."""

    def __init__(self, torch: str) -> None:
        self.torch = torch
        self.folder = Path(sys.prefix) / "older" / f"torch-{torch}"
        self.python = self.folder / "bin" / "python"

    def command(self, *words: str, timeout_s: float = 1800) -> tuple[int, str]:
        """Run this environment's Python."""
        argv = [str(self.python), *words]
        ended = subprocess.run(
            argv, cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=timeout_s, check=False
        )
        return ended.returncode, ended.stdout + ended.stderr

    def set_up(self) -> None:
        """Install what the suite needs, unless that was done; skip where there is no such torch for this Python."""
        pins = (ROOT / "constraints.txt").read_text()
        wanted = re.sub(r"^torch(vision)?===?.*\n", "", pins, flags=re.MULTILINE) + f"torch=={self.torch}\n"
        ready = self.folder / ".ready"
        if ready.exists() and ready.read_text() == wanted:
            return
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(self.folder)], check=True, timeout=300)
        constraints = self.folder / "constraints.txt"
        constraints.write_text(wanted)
        install = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", str(constraints)]
        code, said = self.command(*install, "-e", ".[mpi]", "pytest", "pytest-timeout", "setuptools")
        if "No matching distribution found for torch" in said:
            pytest.skip(f"pip finds no torch {self.torch} for Python {sys.version.split()[0]}")
        assert code == 0, said
        ready.write_text(wanted)

    def install_horovod(self) -> None:
        """Compile Horovod for it, unless that was done; skip where there is no compiler."""
        code, said = self.command("-m", "hvdtrain", "install-horovod", "--mpi", "--nccl", "off")
        if "a C++ compiler" in said:
            pytest.skip(said)
        assert code == 0, said

    def argv(self, launch: Launch, ranks: int, *argv: str) -> list[str]:
        """As `Launch.argv`, by this environment's programs."""
        there = str(self.folder / "bin")
        return [
            re.sub(rf"^{re.escape(str(Path(sys.executable).parent))}(?=/)", there, word)
            for word in launch.argv(ranks, *argv)
        ]


@pytest.fixture(scope="module", params=OLDER)
def setting(request: pytest.FixtureRequest) -> Setting:
    made = Setting(request.param)
    made.set_up()
    return made


@pytest.mark.parametrize(("launch", "ranks"), [(LOCAL, 1), (TORCH, 2), (MPI, 2), (HOROVOD_MPIRUN, 2)], ids=str)
def test_the_backend_keeps_every_promise(setting, tmp_path, launch, ranks):
    if launch.backend == "horovod":
        setting.install_horovod()
    record = tmp_path / "record.json"
    how = ["--backend", launch.backend, "--log-dir", str(tmp_path), "--record", str(record), "-q"]
    ended = run(setting.argv(launch, ranks, "-m", "hvdtrain.testing", *how), timeout_s=900)
    logs = {file.name: file.read_text() for file in sorted(tmp_path.glob("rank*.log"))}
    shown = "\n\n".join([ended.output, *(f"--- {name}\n{text[-6000:]}" for name, text in logs.items())])
    assert ended.code == 0, shown
    assert len(logs) == ranks
    found = features.Record.read(record)
    assert found.versions["PyTorch"] == setting.torch
    promised = features.cells_in(PAGE, launch.backend)
    promised |= dict.fromkeys(LACKS.get(setting.torch, ()), "refused")
    assert {feature: found.cell(feature) for feature in features.FEATURES} == promised
