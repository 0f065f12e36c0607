"""Runs the conformance suite (`hvdtrain.testing`) under the real launcher, once per backend and world size."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys

import pytest

LAUNCHES = [
    ("local", 1, []),
    *[
        ("torch", n, ["-m", "torch.distributed.run", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--nproc-per-node", str(n)])
        for n in (1, 2, 3, 4)
    ],
]  # fmt: skip


@pytest.mark.parametrize(("backend", "ranks", "launcher"), LAUNCHES, ids=[f"{b}-{n}" for b, n, _ in LAUNCHES])
def test_the_backend_keeps_every_promise(tmp_path, backend, ranks, launcher):
    argv = [sys.executable, *launcher, "-m", "hvdtrain.testing", "--backend", backend, "--log-dir", str(tmp_path), "-q"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        argv, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        output += "\nstill running after 240 s"
    logs = {file.name: file.read_text() for file in sorted(tmp_path.glob("rank*.log"))}
    shown = "\n\n".join([output, *(f"--- {name}\n{text[-6000:]}" for name, text in logs.items())])
    assert process.returncode == 0, shown
    assert len(logs) == ranks
    counts = {
        int(found[1]) for text in logs.values() for found in [re.search(r"^(\d+) passed in", text, re.M)] if found
    }
    assert len(counts) == 1, shown
    assert counts.pop() > 250
