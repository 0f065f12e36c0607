"""Lives of one run, each begun as the one before was, and killed: what must hold after each, and at the end."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

from hvdtrain.training.checkpoint import Checkpoints

STEPS = 40
FLAGS = [
    "--model", "mlp", "--batch-size", "16", "--max-steps", str(STEPS), "--checkpoint-every", "1", "--log-every", "1",
    "--optimizer", "AdamW", "--device", "cpu",
]  # fmt: skip


def records(folder: Path) -> list[int]:
    """The steps that are in metrics.jsonl, without a line that is cut off."""
    try:
        lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    found = [json.loads(line) for line in lines if line.endswith("\n")]
    return [one["step"] for one in found if one["kind"] == "step"]


def finished(folder: Path) -> str | None:
    """The hash of the parameters, if the run has ended."""
    file = folder / "summary.json"
    return json.loads(file.read_text())["parameters_sha256"] if file.exists() else None


class Watcher:
    """What a run has shown to have saved can be lost by no kill."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.newest = 0

    def look(self) -> None:
        """After a kill."""
        folder = self.folder / "checkpoints"
        saved = Checkpoints(folder, lock=self.folder / ".lock").latest() if folder.exists() else None
        step = saved.step if saved else 0
        shown = max(records(self.folder), default=0) - 1  # a step is shown before its checkpoint is written
        assert step >= self.newest, f"step {self.newest} was there, and the newest whole one is of step {step}"
        assert step >= shown, f"step {shown} was saved, and the newest whole one is of step {step}"
        self.newest = step


def wait_for_a_step(folder: Path, child: int) -> None:
    """Until a life has made a step of its own, or has ended."""
    before, end = records(folder), time.monotonic() + 60
    while records(folder) == before and time.monotonic() < end:
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return
        time.sleep(0.005)


def kill_all(mark: str) -> int:
    """Kill every process that was started with this mark in its environment, and wait until all are gone."""
    killed, end = 0, time.monotonic() + 60
    while True:
        alive = list(_marked(mark.encode()))
        if not alive:
            return killed
        assert time.monotonic() < end, alive
        for pid in alive:
            try:
                os.kill(pid, signal.SIGKILL)
                killed += 1
            except ProcessLookupError:
                pass
        time.sleep(0.05)


def _marked(mark: bytes):
    for entry in os.listdir("/proc"):
        if entry.isdigit() and int(entry) != os.getpid():
            try:
                environment = Path(f"/proc/{entry}/environ").read_bytes()
            except OSError:
                continue
            if mark in environment:
                yield int(entry)


def main() -> None:
    """``python killed_runs.py FOLDER KILLS SEED``: whole runs in processes of their own, killed after a random time."""
    import random
    import sys

    import torch

    from hvdtrain.cli import main as hvdtrain
    from hvdtrain.run import run_training  # noqa: F401

    torch.set_num_threads(1)
    place, kills, chance = Path(sys.argv[1]), int(sys.argv[2]), random.Random(int(sys.argv[3]))
    flags = [*FLAGS, "--backend", "local"]

    def live(folder: Path) -> int:
        child = os.fork()
        if child == 0:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os._exit(hvdtrain([*flags, "--run-dir", str(folder)]))
        return child

    began = time.monotonic()
    assert os.waitstatus_to_exitcode(os.waitpid(live(place / "whole"), 0)[1]) == 0
    life_s = time.monotonic() - began
    expected, done, ended, number = finished(place / "whole"), 0, 0, 0
    while done < kills:
        folder, number = place / str(number), number + 1
        watcher = Watcher(folder)
        while finished(folder) is None:
            child = live(folder)
            if chance.random() < 0.8:  # while it saves; else at any moment from its beginning
                wait_for_a_step(folder, child)
                time.sleep(chance.uniform(0, 3 * life_s / STEPS))
            else:
                time.sleep(chance.uniform(0, life_s))
            os.kill(child, signal.SIGKILL)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            assert code in (0, -signal.SIGKILL), code
            done += code != 0
            watcher.look()
        assert finished(folder) == expected, folder
        ended += 1
    print(f"{done} kills, {ended} runs, all as the uninterrupted one; {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
