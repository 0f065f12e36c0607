"""A notebook in a real Jupyter kernel: `spawn` from its cells, what is shown there, and Ctrl-C.

Jupyter is installed into an environment beside this one, at the first run; it sees this one's packages.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
from launching import ROOT, run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
JUPYTER = ["ipykernel==7.4.0", "jupyter-client==8.10.0"]

CELLS: dict[str, dict[str, Any]] = {
    "setup": {
        "code": """
import os, signal, sys, threading, time
import torch
from torch.utils.data import TensorDataset
import hvdtrain

lock = threading.Lock()

class Line(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 1)
        self.lock = None
    def forward(self, x):
        return self.linear(x)

def mse(a, b):
    return ((a - b) ** 2).mean()

def train(backend, epochs=1, start=lambda: None):
    torch.manual_seed(0)
    start()
    model, x = Line(), torch.randn(400, 4)
    data = TensorDataset(x, x.sum(1, keepdim=True))
    with hvdtrain.ProgressLogger(epochs) as progress:
        trainer = hvdtrain.Trainer(
            backend, model, torch.optim.SGD(model.parameters(), lr=0.1), loss=mse,
            logger=progress if backend.rank == 0 else None, log_every=1,
        )
        trainer.fit(data, data, epochs=epochs, batch_size=4)
    return model

def running():
    found = os.popen(f"ps --ppid {os.getpid()} -o args").read()
    return found.count("hvdtrain.workers")
"""
    },
    "trained": {
        "code": """
one, other = hvdtrain.spawn(train, 2, device="cpu")
print("a Line:", isinstance(one, Line), "the same:", torch.equal(one.linear.weight, other.linear.weight))
"""
    },
    "here": {
        "code": """
with hvdtrain.init("local", device="cpu") as backend:
    train(backend)
"""
    },
    "printed": {
        "code": """
def prints(backend):
    print(f"rank {backend.rank} prints\\n", end="", flush=True)
    print(f"rank {backend.rank} warns\\n", end="", flush=True, file=sys.stderr)
hvdtrain.spawn(prints, 2, device="cpu");
"""
    },
    "lock of a cell": {
        "code": "def locks(backend):\n    with lock:\n        return 1\nhvdtrain.spawn(locks, 2, device='cpu')"
    },
    "lock of a model": {
        "code": "model = Line(); model.lock = lock\nhvdtrain.spawn(train, 2, args=(1, model), device='cpu')"
    },
    "generator": {
        "code": """
def caller(numbers):
    hvdtrain.spawn(lambda backend: next(numbers), 2, device="cpu")
caller(number for number in range(3))
"""
    },
    "lock returned": {"code": "hvdtrain.spawn(lambda backend: threading.Lock(), 1, 'local')"},
    "raised": {
        "code": """
def fails(backend):
    if backend.rank == 1:
        raise KeyError("planted here")
    backend.barrier()
hvdtrain.spawn(fails, 2, device="cpu")
"""
    },
    "interrupted": {
        "code": "hvdtrain.spawn(train, 2, args=(10**6, lambda: print('ready', flush=True)), device='cpu')",
        "interrupts": [1.0],
    },
    "left by the interrupt": {"code": "print(running())"},
    "interrupted twice": {
        "code": """
def deaf(backend):
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    print("ready", flush=True)
    time.sleep(600)
hvdtrain.spawn(deaf, 2, device="cpu")
""",
        "interrupts": [0.5, 1.5],
    },
    "left by two": {"code": "print(running())"},
    "interrupted here": {
        "code": """
with hvdtrain.init("local", device="cpu") as backend:
    train(backend, 10**6, lambda: print("ready", flush=True))
""",
        "interrupts": [1.0],
    },
    "goes on": {"code": "print(len(hvdtrain.spawn(train, 2, device='cpu')), running())"},
}


def jupyter() -> Path:
    """The Python of the environment that has a kernel; set up unless that was done."""
    folder = Path(sys.prefix) / "jupyter"
    python, ready = folder / "bin" / "python", folder / ".ready"
    if ready.exists() and ready.read_text() == str(JUPYTER):
        return python
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True, timeout=300)
    (beside,) = folder.glob("lib/python*/site-packages")
    (beside / "tested.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *JUPYTER]
    ended = subprocess.run(install, capture_output=True, text=True, timeout=600, check=False)
    if ended.returncode:
        pytest.skip(f"Jupyter could not be installed: {ended.stderr.strip()[-300:]}")
    ready.write_text(str(JUPYTER))
    return python


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("notebook")
    (folder / "cells.json").write_text(json.dumps(list(CELLS.values())))
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    driver = [str(jupyter()), str(ROOT / "tests/system/notebook_cells.py")]
    ended = run([*driver, str(folder / "cells.json"), str(folder / "shown.json")], timeout_s=600, PYTHONPATH=path)
    assert ended.code == 0, ended.output
    return dict(zip(CELLS, json.loads((folder / "shown.json").read_text()), strict=True))


def test_a_function_of_a_cell_trains_and_its_model_comes_back(shown):
    assert "a Line: True the same: True" in shown["trained"]["stdout"], shown["trained"]


@pytest.mark.parametrize("cell", ["trained", "here"])
def test_progress_is_one_output_that_is_replaced(shown, cell):
    steps = 50 if cell == "trained" else 100
    lines = [text for text in shown[cell]["displays"] if text.startswith("step ")]
    assert [line.split("  ")[0] for line in lines] == [f"step {steps}/{steps}"]
    assert 0 < shown[cell]["updates"] < steps  # each is a message
    assert "step" not in shown[cell]["stdout"]
    assert sum("evaluated: loss" in text for text in [shown[cell]["stdout"], *shown[cell]["displays"]]) == 1


def test_what_ranks_print_is_in_the_cell(shown):
    assert sorted(shown["printed"]["stdout"].split("\n")) == ["", "rank 0 prints", "rank 1 prints"]
    assert sorted(shown["printed"]["stderr"].split("\n")) == ["", "rank 0 warns", "rank 1 warns"]


@pytest.mark.parametrize(
    ("cell", "named"),
    [
        ("lock of a cell", "locks() -> lock, of type lock,"),
        ("lock of a model", "args -> [1] -> lock, of type lock,"),
        ("generator", "<lambda>() -> numbers, of type generator,"),
    ],
)
def test_what_cannot_be_sent_is_named(shown, cell, named):
    error = shown[cell]["error"]
    assert error["name"] == "ConfigError"
    assert error["says"].startswith(named)
    assert error["says"].endswith("make it inside the function, on each rank")


def test_a_result_that_cannot_be_sent_is_named(shown):
    assert "result, of type lock, cannot be pickled" in shown["lock returned"]["error"]["says"]


def test_a_ranks_traceback_is_in_the_cell_with_the_cells_lines(shown):
    error = shown["raised"]["error"]
    assert error["name"] == "RankFailure"
    assert 'raise KeyError("planted here")\nKeyError' in error["says"]


@pytest.mark.parametrize(
    ("cell", "after"),
    [("interrupted", "left by the interrupt"), ("interrupted twice", "left by two"), ("interrupted here", None)],
)
def test_an_interrupt_ends_the_ranks_and_not_the_kernel(shown, cell, after):
    assert shown[cell]["error"] == {"name": "KeyboardInterrupt", "says": "", "alive": True}, shown[cell]
    assert after is None or shown[after]["stdout"].strip() == "0"


def test_another_spawn_works_after_all_that(shown):
    assert shown["goes on"]["stdout"].strip().endswith("2 0")
