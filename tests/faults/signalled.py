"""Jobs whose launcher gets a signal: started for real, signalled, waited for, and what is left of them found and ended."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path

from launching import BIN, ENVIRONMENT, LAUNCHERS, ROOT

MARK = "HVDTRAIN_TEST_MARK"
HERE = Path(__file__).resolve().parent
JOB = HERE / "spawn_job.py"


def spawn(ranks: int, *argv: str) -> list[str]:
    """`hvdtrain.spawn` from a script; takes the same words as the others."""
    return [sys.executable, str(JOB), str(ranks), *argv]


STARTS = {**LAUNCHERS, "spawn": spawn}


@dataclass
class Job:
    """A running job, and after `finish` what became of it."""

    process: subprocess.Popen[bytes]
    mark: str
    folder: Path
    code: int | None = None
    seconds: float = 0.0
    left: list[str] = field(default_factory=list)

    @property
    def output(self) -> str:
        return (self.folder / "out").read_text(errors="replace")

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"

    def steps(self) -> int:
        """The last step that was logged."""
        file = self.run_dir / "metrics.jsonl"
        found = (
            [json.loads(line).get("step", 0) for line in file.read_text().splitlines()[-3:]] if file.exists() else []
        )
        return max(found, default=0)

    def saved(self) -> int:
        """The step of the newest checkpoint."""
        return max((int(one.name[5:]) for one in (self.run_dir / "checkpoints").glob("step-*[0-9]")), default=0)

    def wait_until_training(self, steps: int = 2, limit_s: float = 120) -> None:
        end = time.monotonic() + limit_s
        while self.steps() < steps:
            assert time.monotonic() < end, f"the job does not train\n{self.output}"
            assert self.process.poll() is None, f"the job ended\n{self.output}"
            time.sleep(0.05)

    def members(self) -> dict[int, str]:
        """Every process that descends from the job, wherever its parent is now, with its command line."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if f"{MARK}={self.mark}".encode() not in (folder / "environ").read_bytes():
                    continue
                if (folder / "stat").read_text().rpartition(")")[2].split()[0] == "Z":
                    continue
                found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        return found

    def ranks(self) -> list[int]:
        """Process ids of the ranks, in the order in which they began."""
        return sorted(pid for pid, line in self.members().items() if "--run-dir" in line and is_rank(pid))

    def send(self, number: signal.Signals) -> None:
        """To the launcher alone, as a scheduler does that knows no more than its pid."""
        os.kill(self.process.pid, number)

    def finish(self, limit_s: float, left_after_s: float) -> Job:
        """Wait for the launcher, and then until nothing is left, both with a bound from now."""
        began = time.monotonic()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.code = self.process.wait(limit_s)
        self.seconds = time.monotonic() - began
        while self.members() and time.monotonic() < began + left_after_s:
            time.sleep(0.1)
        self.gone_s = time.monotonic() - began
        self.left = list(self.members().values())
        return self

    def end(self) -> None:
        for pid in self.members():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


def is_rank(pid: int) -> bool:
    """Whether a process says that it is one rank of some, in the variables that it was started with, and is Python."""
    names = (b"\0OMPI_COMM_WORLD_RANK=", b"\0RANK=", b"\0HOROVOD_RANK=", b"\0HVDTRAIN_RANK=", b"\0PMI_RANK=")
    with contextlib.suppress(OSError):
        environ = b"\0" + Path(f"/proc/{pid}/environ").read_bytes()
        program = os.readlink(f"/proc/{pid}/exe")
        return "python" in program and any(name in environ for name in names)
    return False


def begin(folder: Path, argv: list[str], **more: str) -> Job:
    """Start a launcher, with these variables more; what it says is in the folder's ``out``."""
    mark = uuid.uuid4().hex
    env = {**os.environ, **ENVIRONMENT, MARK: mark, **more}
    env["PATH"] = f"{BIN}{os.pathsep}{env['PATH']}"
    with (folder / "out").open("wb") as out:
        process = subprocess.Popen(
            argv, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
        )
    return Job(process, mark, folder)


def wait_for_ranks(job: Job, ranks: int, limit_s: float = 120) -> list[int]:
    """Wait until so many ranks have said "rank PID"; their pids."""
    end = time.monotonic() + limit_s
    while len(found := re.findall(r"rank (\d+)", job.output)) < ranks:
        assert time.monotonic() < end, job.output
        time.sleep(0.05)
    return [int(pid) for pid in found]


@contextlib.contextmanager
def job(
    launcher: str, backend: str, folder: Path, *flags: str, ranks: int = 2, before: tuple[str, ...] = (), **more: str
):
    """The main job, with slow steps and without end, under a launcher."""
    found = os.pathsep.join([str(HERE), *filter(None, [more.pop("PYTHONPATH", os.environ.get("PYTHONPATH"))])])
    argv = [
        *("env", "--default-signal=HUP,INT"),  # whatever nohup these tests run under
        *before,
        *STARTS[launcher](
            ranks, "-m", "hvdtrain", "--backend", backend, "--run-dir", str(folder / "run"), "--epochs", "10000",
            "--task", "slow_task:Slow", "--log-every", "1", "--batch-size", "4", "--timeout", "60", "--keep", "2", *flags,
        ),
    ]  # fmt: skip
    started = begin(folder, argv, **more, PYTHONPATH=found)
    try:
        yield started
    finally:
        started.end()
