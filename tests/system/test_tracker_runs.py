"""Weights & Biases, offline, and MLflow, as they are installed for this test alone: a run, killed, and what they have of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from launching import ROOT, TORCH, run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
READ_MLFLOW = """
import json, sys
from mlflow.tracking import MlflowClient
client = MlflowClient(tracking_uri=sys.argv[1])
found = client.search_runs(["0"])
run = found[0]
curves = {name: [[m.step, m.value] for m in client.get_metric_history(run.info.run_id, name)] for name in run.data.metrics}
print(json.dumps({"runs": len(found), "status": run.info.status, "curves": curves, "params": run.data.params}))
"""
READ_WANDB = """
import json, struct, sys
from wandb.proto import wandb_internal_pb2 as pb
BLOCK, HEAD = 32768, 7  # the format of LevelDB's logs: records in parts, none of which crosses the end of a block
found = []
for file in sys.argv[1:]:
    data, at, whole = open(file, "rb").read(), 7, b""  # after the file's own seven bytes
    while at + HEAD <= len(data):
        if BLOCK - at % BLOCK < HEAD:
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + HEAD])
        part, at = data[at + HEAD : at + HEAD + length], at + HEAD + length
        whole = part if kind in (1, 2) else whole + part
        if kind in (1, 4):
            record = pb.Record()
            record.ParseFromString(whole)
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                found.append({i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in items})
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """A folder with both, beside what is installed."""
    folder = tmp_path_factory.mktemp("packages")
    wanted = ["wandb", "mlflow-skinny", "sqlalchemy", "alembic"]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--target", str(folder)]
    done = subprocess.run([*pip, *wanted], capture_output=True, text=True, timeout=900, check=False)
    if done.returncode:
        pytest.skip(f"they cannot be installed here: {done.stderr[-300:]}")
    return folder


def trained(folder, packages, steps, logger):
    flags = [
        "--model",
        "mlp",
        "--log-every",
        "2",
        "--checkpoint-every",
        "4",
        "--max-steps",
        str(steps),
        "--logger",
        logger,
    ]
    return run(
        TORCH.hvdtrain(2, *flags, "--run-dir", str(folder)),
        PYTHONPATH=f"{ROOT}{os.pathsep}{packages}", WANDB_MODE="offline",
    )  # fmt: skip


def said_by(script, packages, *words):
    env = {**os.environ, "PYTHONPATH": str(packages)}
    done = subprocess.run(
        [sys.executable, "-c", script, *words], env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def own(folder: Path, kind: str) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def test_mlflow_has_one_run_with_all_that_metrics_jsonl_has(packages, tmp_path):
    folder = tmp_path / "run"
    for steps in (8, 14):  # the second goes on
        ended = trained(folder, packages, steps, "mlflow")
        assert ended.code == 0, ended.output
    found = said_by(READ_MLFLOW, packages, f"sqlite:///{folder / 'mlflow.db'}")
    assert (found["runs"], found["status"]) == (1, "FINISHED")
    assert found["curves"]["train/loss"] == [[line["step"], line["loss"]] for line in own(folder, "step")]
    assert found["curves"]["eval/accuracy"] == [[line["step"], line["eval_accuracy"]] for line in own(folder, "eval")]
    assert found["params"]["model"] == "mlp"


def test_wandb_has_all_that_metrics_jsonl_has_offline_and_one_number(packages, tmp_path):
    folder = tmp_path / "run"
    for steps in (8, 14):
        ended = trained(folder, packages, steps, "tensorboard,wandb")
        assert ended.code == 0, ended.output
    files = sorted(map(str, folder.glob("wandb/offline-run-*/*.wandb")))
    assert len(files) == 2
    number = (folder / "wandb_run").read_text().strip()
    assert all(file.endswith(f"run-{number}.wandb") for file in files)
    found = {entry["_step"]: entry for entry in said_by(READ_WANDB, packages, *files)}
    for line in own(folder, "step"):
        assert found[line["step"]]["train/loss"] == line["loss"]
    for line in own(folder, "eval"):
        assert found[line["step"]]["eval/accuracy"] == line["eval_accuracy"]


def test_a_tracker_that_cannot_be_reached_is_said_before_training(packages, tmp_path):
    ended = run(
        TORCH.hvdtrain(2, "--model", "mlp", "--max-steps", "2", "--logger", "mlflow", "--run-dir", str(tmp_path / "run")),
        PYTHONPATH=f"{ROOT}{os.pathsep}{packages}", MLFLOW_TRACKING_URI="http://127.0.0.1:9", MLFLOW_HTTP_REQUEST_MAX_RETRIES="1",
    )  # fmt: skip
    assert ended.code != 0
    assert "--logger mlflow does not start" in ended.output
