"""A run whose machine is gone, disk and all, goes on on another one from the copies of its checkpoints."""

from __future__ import annotations

import json
import shutil

import pytest
from launching import hvdtrain, run

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("beside", [[], ["--checkpoint-async"]], ids=["at once", "async"])
def test_a_run_whose_folder_is_gone_goes_on_bit_for_bit(tmp_path, beside):
    flags = ["--epochs", "1", "--batch-size", "64", "--checkpoint-every", "4", "--schedule", "constant", *beside]
    assert run(hvdtrain(2, *flags, "--run-dir", str(tmp_path / "whole"))).code == 0
    flags += ["--run-dir", str(tmp_path / "run"), "--checkpoint-url", f"file://{tmp_path / 'there'}"]
    ended = run(hvdtrain(2, *flags, "--max-steps", "7"))
    assert ended.code == 0, ended.output
    shutil.rmtree(tmp_path / "run")
    ended = run(hvdtrain(2, *flags))
    assert ended.code == 0, ended.output
    assert "brought step-00000007 back from file://" in ended.output
    whole, parts = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("whole", "run"))
    assert parts["parameters_sha256"] == whole["parameters_sha256"]
    ended = run(hvdtrain(2, *flags, "--resume", "never"))
    assert ended.code != 0
    assert "begins anew: nothing there is set aside" in ended.output
