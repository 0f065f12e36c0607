"""Runs jobs of ranks as a user would, with a bound, and leaves no process behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Ended:
    code: int
    output: str
    seconds: float


def run(argv: list[str], *, timeout_s: float = 240, cwd: Path = ROOT, **environment: str) -> Ended:
    began = time.monotonic()
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    process = subprocess.Popen(
        argv, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        pytest.fail(f"still running after {timeout_s} s: {' '.join(argv)}\n{output}")
    return Ended(process.returncode, output, time.monotonic() - began)


def torchrun(ranks: int, *argv: str) -> list[str]:
    return [
        sys.executable, "-m", "torch.distributed.run", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0",
        "--nproc-per-node", str(ranks), *argv,
    ]  # fmt: skip


def hvdtrain(ranks: int, *flags: str) -> list[str]:
    if ranks == 1:
        return [sys.executable, "-m", "hvdtrain", *flags]
    return torchrun(ranks, "-m", "hvdtrain", "--backend", "torch", *flags)
