"""A trained model leaves by the command line, becomes a new run's beginning, and is the same model there."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from launching import hvdtrain, run

COMMAND = [sys.executable, "-m", "hvdtrain"]


pytestmark = pytest.mark.slow  # five starts of torch each; tests/unit/exchange has the same in one process


@pytest.mark.parametrize("form", ["dcp", "torch", "safetensors"])
def test_a_run_goes_on_with_a_model_that_was_exported_and_imported(tmp_path, form):
    flags = ["--epochs", "1", "--max-steps", "5", "--schedule", "constant"]
    assert run(hvdtrain(1, *flags, "--run-dir", str(tmp_path / "run"))).code == 0
    optimizer = [] if form == "safetensors" else ["--optimizer"]
    ended = run([*COMMAND, "export", str(tmp_path / "run"), str(tmp_path / "out"), "--format", form, *optimizer])
    assert ended.code == 0, ended.output
    assert ended.output.startswith(f"wrote {tmp_path / 'out'}: ")
    ended = run([*COMMAND, "import", str(tmp_path / "out"), str(tmp_path / "new")])
    assert ended.code == 0, ended.output
    assert ("optimizer's state" in ended.output) == (form != "safetensors")
    ended = run(hvdtrain(1, "--epochs", "0", "--run-dir", str(tmp_path / "new")))
    assert ended.code == 0, ended.output
    old, new = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("run", "new"))
    assert new["parameters_sha256"] == old["parameters_sha256"]
    assert new["eval_loss"] == old["eval_loss"]
    assert new["steps"] == 0
    ended = run(hvdtrain(1, *flags, "--run-dir", str(tmp_path / "new")))
    assert ended.code == 0, ended.output
    assert json.loads((tmp_path / "new" / "summary.json").read_text())["steps"] == 5


def test_a_file_that_is_no_model_is_one_line(tmp_path):
    torch.save(torch.nn.Linear(1, 1), tmp_path / "module.pt")
    ended = run([*COMMAND, "import", str(tmp_path / "module.pt"), str(tmp_path / "new")])
    assert ended.code == 1
    assert ended.output.startswith(f"hvdtrain: error: {tmp_path / 'module.pt'} holds more than plain tensors")
    assert ended.output.count("\n") == 1
