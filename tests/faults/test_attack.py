"""Another user of the machine can neither end a job of one node, nor hold it up, nor read its secret, whatever it connects to."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from launching import ENVIRONMENT, HOROVOD_GLOO, HOROVOD_MPI, LAUNCHERS, MPI, ROOT, TORCH, missing

HERE = Path(__file__).parent
NOBODY = 65534
BOUND_S = 60
STEPS = 20
HOST_LOOPBACK = "0100007F"  # 127.0.0.1, as the kernel writes it


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")
@pytest.mark.parametrize(
    "launch",
    [MPI, *(pytest.param(launch, marks=pytest.mark.slow) for launch in (TORCH, HOROVOD_GLOO, HOROVOD_MPI))],
    ids=str,
)
def test_another_user_can_neither_end_a_job_nor_hold_it_up_nor_read_its_secret(launch, tmp_path):
    reason = missing(launch.launcher, launch.backend)
    if reason:
        pytest.skip(reason)
    temporary = tempfile.mkdtemp(prefix="ha-")
    Path(temporary).chmod(0o1777)  # as /tmp is
    environment = {
        **os.environ,
        **ENVIRONMENT,
        "TMPDIR": temporary,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    argv = LAUNCHERS[launch.launcher](2, str(HERE / "attack_job.py"), launch.backend, str(tmp_path))
    began: list[subprocess.Popen[str]] = []
    try:
        with (tmp_path / "said").open("w") as said:
            attacker = subprocess.Popen(
                [sys.executable, str(HERE / "attacker.py"), str(NOBODY)],
                stdin=subprocess.PIPE, stdout=said, stderr=said, text=True,
            )  # fmt: skip
            began.append(attacker)
        job = subprocess.Popen(
            argv, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        )  # fmt: skip
        began.append(job)
        _attack_while_it_starts(attacker, job, temporary, tmp_path)
        listening = _listening(temporary)
        _attack(attacker, tmp_path, [temporary, *_folders(temporary), *sorted({str(port) for _, port, _ in listening})])
        before = _steps(tmp_path)
        _until(lambda: _steps(tmp_path) > before + STEPS, job)  # while the attacker holds its connections open
        attacker.communicate(timeout=BOUND_S)  # mpirun itself ends no job while one of its own ports is held
        (tmp_path / "stop").touch()
        output, _ = job.communicate(timeout=BOUND_S)
    finally:
        for process in began:
            if process.poll() is None:
                (os.killpg if process is not attacker else os.kill)(process.pid, signal.SIGKILL)
            process.communicate()
        shutil.rmtree(temporary, ignore_errors=True)
    words = _said(tmp_path)
    assert job.returncode == 0, output + words
    assert output.count("done") == 2, output
    assert not re.search(r"READ|CONNECTED|LISTED \S+/hvdtrain-|Traceback", words), words
    assert "refused" in words
    ranks = {int((tmp_path / f"running-{rank}").read_text()) for rank in range(2)}
    assert {address for address, _, process in listening if process in ranks} <= {HOST_LOOPBACK}, listening


def _attack_while_it_starts(attacker, job, temporary: str, folder: Path) -> None:
    """The file and the socket are there for a moment only."""
    told: set[str] = set()

    def running() -> bool:
        for path in Path(temporary).glob("hvdtrain-*/*"):
            if str(path) not in told:
                told.add(str(path))
                _tell(attacker, [str(path)])
        return all((folder / f"steps-{rank}").exists() for rank in range(2))

    _until(running, job)
    assert told


def _attack(attacker, folder: Path, words: list[str]) -> None:
    before = _said(folder).count("caught up")
    _tell(attacker, [*words, "?"])
    _until(lambda: _said(folder).count("caught up") > before, attacker)


def _tell(attacker, words: list[str]) -> None:
    attacker.stdin.write("".join(f"{word}\n" for word in words))
    attacker.stdin.flush()


def _until(come: Callable[[], bool], process) -> None:
    end = time.monotonic() + BOUND_S
    while not come():
        assert process.poll() is None, process.stdout and process.stdout.read()
        assert time.monotonic() < end
        time.sleep(0.01)


def _steps(folder: Path) -> int:
    return min(int((folder / f"steps-{rank}").read_text() or 0) for rank in range(2))


def _said(folder: Path) -> str:
    return (folder / "said").read_text()


def _folders(temporary: str) -> list[str]:
    return [str(path) for path in Path(temporary).glob("hvdtrain-*")]


def _listening(temporary: str) -> list[tuple[str, int, int]]:
    """On which addresses and TCP ports processes of the job listen, and which."""
    owners = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f"TMPDIR={temporary}".encode() in (process / "environ").read_bytes() or temporary in (
                process / "cmdline"
            ).read_text(errors="replace"):
                links = [os.readlink(link) for link in (process / "fd").iterdir()]
                owners |= {
                    link[len("socket:[") : -1]: int(process.name) for link in links if link.startswith("socket:[")
                }
        except OSError:
            continue
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and words[9] in owners:
                address, _, port = words[1].rpartition(":")
                found.append((address, int(port, 16), owners[words[9]]))
    return found
