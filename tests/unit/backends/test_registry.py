"""Backends by name, those of other packages included."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hvdtrain import backends
from hvdtrain.backends.local import LocalBackend
from hvdtrain.errors import BackendUnavailable, ConfigError
from hvdtrain.launch.detect import detect

MODULE = """
from hvdtrain.backends.local import LocalBackend

class Mine(LocalBackend):
    name = "mine"
    @property
    def engine(self):
        return "an engine of mine"
"""


def with_plugin(folder: Path, target: str) -> dict[str, str]:
    (folder / "their_backend.py").write_text(MODULE)
    info = folder / "theirs-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[hvdtrain.backends]\nmine = {target}\nlocal = {target}\n")
    return {**os.environ, "PYTHONPATH": str(folder)}


def run(code: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


def test_a_backend_of_another_package_is_found_made_and_trains(tmp_path):
    environment = with_plugin(tmp_path, "their_backend:Mine")
    flags = ["--backend", "mine", "--max-steps", "2", "--run-dir", str(tmp_path / "run")]
    ended = subprocess.run(
        [sys.executable, "-m", "hvdtrain", *flags], env=environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert "backend mine (an engine of mine)" in ended.stdout


def test_it_cannot_take_the_place_of_one_of_ours(tmp_path):
    environment = with_plugin(tmp_path, "their_backend:Mine")
    said = run("from hvdtrain import backends; print(backends.names(), backends.load('local').__name__)", environment)
    assert said.stdout.strip() == "['horovod', 'local', 'mine', 'mpi', 'torch'] LocalBackend"


def test_one_that_cannot_be_imported_is_named_and_the_others_work(tmp_path):
    environment = with_plugin(tmp_path, "no_such_module:Mine")
    code = "from hvdtrain import backends; print('mine' in backends.available(), backends.why_not('mine'))"
    said = run(code, environment).stdout
    assert said.startswith("False backend 'mine' (no_such_module:Mine) cannot be imported")


def test_names_and_options_that_nobody_knows_are_refused():
    with pytest.raises(ConfigError, match="did you mean 'torch'"):
        backends.create("torhc", detection=detect({}))
    with pytest.raises(ConfigError, match="'local' has no option 'fusion'"):
        backends.create("local", detection=detect({}), fusion=3)


def test_auto_takes_the_local_backend_without_a_launcher():
    name, reason = backends.choose(detect({}))
    assert name == "local"
    assert reason.endswith("-> local")
    assert isinstance(backends.create(detection=detect({}), device="cpu"), LocalBackend)


def test_auto_falls_back_where_the_preferred_one_is_missing(monkeypatch):
    monkeypatch.setattr(backends, "why_not", lambda name: "" if name == "torch" else "not here")
    environment = {
        "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_LOCAL_RANK": "0", "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    }  # fmt: skip
    assert backends.choose(detect(environment))[0] == "torch"
    monkeypatch.setattr(backends, "why_not", lambda name: "not here")
    with pytest.raises(BackendUnavailable, match="no backend can serve"):
        backends.choose(detect(environment))
