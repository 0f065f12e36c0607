"""Another user of the machine can neither end a job of one node, nor read its secret, whatever it connects to."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from launching import ENVIRONMENT, LAUNCHERS, MPI, ROOT, TORCH, missing

HERE = Path(__file__).parent
NOBODY = 65534
STARTUP_S = 120


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")
@pytest.mark.slow
@pytest.mark.parametrize("launch", [MPI, TORCH], ids=str)
def test_another_user_can_neither_end_a_job_nor_read_its_secret(launch, tmp_path):
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
    argv = LAUNCHERS[launch.launcher](2, str(HERE / "attack_job.py"), launch.backend, "12", str(tmp_path))
    job = subprocess.Popen(
        argv, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        # While it starts: the file and the socket are there for a moment only.
        found = _attacked_while_it_starts(temporary, tmp_path)
        ports = _listening(temporary)
        said = _attack([*map(str, ports), temporary, *_folders(temporary)])
        output, _ = job.communicate(timeout=STARTUP_S)
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
        shutil.rmtree(temporary, ignore_errors=True)
    assert job.returncode == 0, output + said
    assert output.count("done") == 2, output
    for words in (found, said):
        assert not re.search(r"READ|CONNECTED|LISTED \S+/hvdtrain-", words), words
    assert "refused" in said


def _attacked_while_it_starts(temporary: str, folder: Path) -> str:
    said = ""
    end = time.monotonic() + STARTUP_S
    while not all((folder / f"running-{rank}").exists() for rank in range(2)):
        assert time.monotonic() < end
        paths = [str(path) for path in Path(temporary).glob("hvdtrain-*/*")]
        if paths and not said:
            said = _attack(paths)
        time.sleep(0.02)
    return said


def _attack(words: list[str]) -> str:
    return subprocess.run(
        [sys.executable, str(HERE / "attacker.py"), str(NOBODY), *words],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=STARTUP_S, check=False,
    ).stdout  # fmt: skip


def _folders(temporary: str) -> list[str]:
    return [str(path) for path in Path(temporary).glob("hvdtrain-*")]


def _listening(temporary: str) -> list[int]:
    """The TCP ports on which processes of the job listen."""
    inodes = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f"TMPDIR={temporary}".encode() in (process / "environ").read_bytes() or temporary in (
                process / "cmdline"
            ).read_text(errors="replace"):
                links = [os.readlink(link) for link in (process / "fd").iterdir()]
                inodes |= {link[len("socket:[") : -1] for link in links if link.startswith("socket:[")}
        except OSError:
            continue
    ports = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and words[9] in inodes:
                ports.add(int(words[1].rpartition(":")[2], 16))
    return sorted(ports)
