"""The summary: its digests against NumPy and hashlib, its file whole or not at all, its lines."""

from __future__ import annotations

import hashlib
import io
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console

from hvdtrain.errors import OutputError
from hvdtrain.observe.summary import Summary, parameters_norm, parameters_sha256, show_summary, write_summary

SUMMARY = Summary(
    backend="torch", engine="gloo", launcher="torchrun", world_size=2, num_nodes=1, device="cpu", global_batch_size=64,
    epochs=3, steps=69, skipped_steps=0, train_loss=0.25, eval_loss=0.5, eval_accuracy=0.875,
    eval_metrics={"accuracy": 0.875, "loss": 0.5}, samples_per_second=12345.6, sent_bytes_per_step=123456.0, wall_seconds=7.25, seed=1, precision="fp32",
    parameters=58634, parameters_norm=12.5, parameters_sha256="ab" * 32, resumed_from=None, hvdtrain_version="0", torch_version="2",
)  # fmt: skip
STATE = {"b": torch.arange(4.0), "a": torch.tensor([[1.5, -2.0]], dtype=torch.float64), "n": torch.tensor(7)}


def test_the_norm_is_over_all_floats():
    assert parameters_norm(STATE) == pytest.approx(math.sqrt(0 + 1 + 4 + 9 + 1.5**2 + 4))


def test_the_digest_is_as_described():
    digest = hashlib.sha256()
    for name, dtype, shape, values in (
        ("a", "torch.float64", (1, 2), np.array([1.5, -2.0], dtype="<f8")),
        ("b", "torch.float32", (4,), np.arange(4, dtype="<f4")),
        ("n", "torch.int64", (), np.array(7, dtype="<i8")),
    ):
        digest.update(f"{name}\0{dtype}\0{shape}\0".encode() + values.tobytes())
    assert parameters_sha256(STATE) == digest.hexdigest()
    strided = {**STATE, "b": torch.arange(8.0)[::2] / 2}
    assert parameters_sha256(strided) == digest.hexdigest()
    assert parameters_sha256({**STATE, "b": torch.arange(4.0) + 1e-7}) != digest.hexdigest()


def test_the_file_is_json_and_what_is_not_finite_is_null(tmp_path):
    file = tmp_path / "deep" / "summary.json"
    write_summary(replace(SUMMARY, train_loss=math.nan, eval_metrics={"loss": math.inf}), file)
    found = json.loads(file.read_text())
    assert found["train_loss"] is None
    assert found["eval_metrics"] == {"loss": None}
    assert found["steps"] == 69
    assert list(file.parent.iterdir()) == [file]


def test_a_file_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(OutputError, match="taken"):
        write_summary(SUMMARY, tmp_path / "taken" / "summary.json")


def test_the_lines_say_what_was_done(tmp_path):
    said = io.StringIO()
    show_summary(SUMMARY, Console(file=said, width=40), tmp_path)
    lines = said.getvalue().splitlines()
    assert lines[0] == "backend        torch (gloo), world size 2, cpu"
    assert "eval accuracy  0.8750" in lines
    assert "speed          12,346 samples/s; 7.2 s in all" in lines
    assert not any("skipped" in line for line in lines)
    assert "trained        3 epochs, 69 steps of 64 samples, fp32" in lines
    show_summary(replace(SUMMARY, skipped_steps=2), Console(file=said, width=200), tmp_path)
    assert "skipped steps  2" in said.getvalue()


def test_a_run_that_only_evaluated_shows_no_training(tmp_path):
    said = io.StringIO()
    evaluated = replace(SUMMARY, epochs=0, steps=0, train_loss=math.nan, samples_per_second=None)
    show_summary(evaluated, Console(file=said, width=200), tmp_path)
    assert "nan" not in said.getvalue()
    assert "train loss" not in said.getvalue()
    assert "samples/s" not in said.getvalue()
    assert "eval accuracy  0.8750" in said.getvalue()
    write_summary(evaluated, tmp_path / "summary.json")
    written = json.loads((tmp_path / "summary.json").read_text())
    assert (written["train_loss"], written["samples_per_second"]) == (None, None)
