"""SIGTERM to every process of a job: real ranks with real loader processes, in a process group of their own."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

RANK = """
import multiprocessing, signal, sys, time, warnings
import torch
from torch.utils.data import Dataset
from hvdtrain.data.loader import make_loader
from hvdtrain.data.partition import BatchPartition
from hvdtrain.data.samplers import PartitionSampler

warnings.filterwarnings("ignore", message="This DataLoader will create")

class Data(Dataset):
    calls = 0
    def __len__(self):
        return 400
    def __getitem__(self, index):
        self.calls += 1
        time.sleep(30 if sys.argv[1] == "killed" and self.calls > 4 else 0.005)
        return torch.tensor(index)

def main():
    multiprocessing.set_start_method(sys.argv[2])
    asked = []
    if sys.argv[1] != "killed":
        signal.signal(signal.SIGTERM, lambda *_: asked.append(True))
    sampler = PartitionSampler(BatchPartition(length=400, global_batch_size=4), shuffle=True, seed=0)
    seen = after = 0
    loader = make_loader(Data(), sampler, workers=2)
    for number, batch in enumerate(loader):
        if number == 1:  # each loader process has loaded one
            print("training", flush=True)
        seen += len(batch)
        after += bool(asked)
        if after == 1 and sys.argv[1] == "raises":
            sys.kept = loader  # as a traceback keeps it: not closed before Python ends its child processes
            raise SystemExit(7)
    print("saved", seen, after > 10, flush=True)

if __name__ == "__main__":
    main()
"""


@contextlib.contextmanager
def rank(tmp_path: Path, how: str, start: str = "fork") -> Iterator[subprocess.Popen[str]]:
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    process = subprocess.Popen(
        [sys.executable, str(script), how, start],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "training\n"
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=30)


def group_is_gone(group: int, within_s: float) -> bool:
    end = time.monotonic() + within_s
    while members(group):
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def members(group: int) -> list[int]:
    """Processes of a group that still run; those that init has not yet reaped do not count."""
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, process_group = file.read_text().rpartition(")")[2].split()[:3]
            if int(process_group) == group and state != "Z":
                found.append(int(file.parent.name))
    return found


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="process groups as Linux has them")


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_a_rank_goes_on_loading_after_a_sigterm_to_all_processes(start: str, tmp_path: Path) -> None:
    with rank(tmp_path, "goes on", start) as process:
        os.killpg(process.pid, signal.SIGTERM)
        out, err = process.communicate(timeout=60)
        # Python's own resource tracker, if the signal comes while it starts, may end and complain; that is not ours.
        err = "\n".join(
            line for line in err.splitlines() if "resource_tracker" not in line and "warnings.warn" not in line
        )
        assert (process.returncode, out, err) == (0, "saved 400 True\n", "")
        assert group_is_gone(process.pid, 3)


def test_a_rank_that_exits_after_a_sigterm_does_not_wait_for_its_loader_processes(tmp_path: Path) -> None:
    with rank(tmp_path, "raises") as process:
        os.killpg(process.pid, signal.SIGTERM)
        began = time.monotonic()
        process.communicate(timeout=60)
        assert process.returncode == 7
        assert time.monotonic() - began < 20  # its last sample would take 30 s, and Python waits for it
        assert group_is_gone(process.pid, 3)


def test_busy_loader_processes_are_gone_soon_after_a_rank_that_died_of_the_sigterm(tmp_path: Path) -> None:
    with rank(tmp_path, "killed") as process:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=30)
        assert process.returncode == -signal.SIGTERM
        assert group_is_gone(process.pid, 2)
