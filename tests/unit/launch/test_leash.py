"""Which ancestors a rank must not outlive, and what it does when one is gone."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hvdtrain.launch.ancestry import Ancestor
from hvdtrain.launch.leash import launchers


def chain(*lines: str) -> list[Ancestor]:
    return [Ancestor(arguments=tuple(line.split()), pid=number) for number, line in enumerate(lines, 100)]


@pytest.mark.parametrize(
    ("launcher", "ancestors", "held_by"),
    [
        ("mpirun", ["/env/bin/prterun -np 2 python -m hvdtrain", "-bash", "sshd: user@pts/0"], [100]),
        ("mpirun", ["bash run.sh", "mpirun -np 2 bash run.sh", "bash"], [101]),
        ("mpirun", ["/usr/bin/prted --prtemca x y", "sshd"], [100]),
        ("mpirun", ["prterun -np 2", "/usr/bin/python3.11 -m hvdtrain guard mpirun -np 2", "bash"], [100, 101]),
        ("mpirun", ["prterun -np 2", "python3 /env/bin/hvdtrain guard mpirun -np 2"], [100, 101]),
        ("torchrun", ["/env/bin/python -m torch.distributed.run --nproc-per-node 2 t.py", "-bash"], [100]),
        ("torchrun", ["/env/bin/python3 -u /env/bin/torchrun --nproc-per-node 2 t.py", "tmux"], [100]),
        (
            "horovodrun",
            ["/bin/sh -c env A=B", "python -c from-multiprocessing", "python /env/bin/horovodrun -np 2 python t.py", "bash"],
            [102],
        ),
        ("horovodrun", ["bash -c cd", "sshd: user@notty", "sshd: user [priv]"], [101]),  # on another host
        ("mpirun", ["-bash", "sshd: user@pts/0"], []),  # a log-in is no launcher: nohup must work
        ("srun", ["slurmstepd: [12.0]"], []),  # Slurm ends its tasks
        ("spawn", ["python notebook.py", "bash"], [100]),
        ("torchrun", [], []),
    ],
)  # fmt: skip
def test_a_rank_is_held_by_its_launchers_and_by_nobody_else(launcher, ancestors, held_by):
    assert [one.pid for one in launchers(launcher, chain(*ancestors))] == held_by


RANK = """
import os, signal, sys, time
from hvdtrain.launch import leash
leash.SAVE_S = 2.0
if sys.argv[1] != "unprotected":
    signal.signal(signal.SIGTERM, lambda *_: print("asked", flush=True) or (sys.argv[1] == "saves" and os._exit(0)))
print(leash.hold(sys.argv[2]), os.getpid(), flush=True)
for _ in range(10):
    time.sleep(1.5)
    if sys.argv[2] != "none":
        print(".", end="", flush=True)  # to a launcher that is gone: no BrokenPipeError
print("outlived it", file=sys.stderr, flush=True)
"""
LAUNCHER = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", sys.argv[1], *sys.argv[2:]], stdout=subprocess.PIPE, text=True)
print(child.stdout.readline(), end="", flush=True)
child.wait()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize(
    ("how", "launcher", "held"),
    [
        ("unprotected", "spawn", True),
        ("saves", "spawn", True),
        ("stuck", "spawn", True),
        ("unprotected", "none", False),
    ],
)
def test_a_rank_whose_launcher_is_killed_is_gone_within_a_bound(tmp_path: Path, how, launcher, held):
    with (tmp_path / "err").open("w") as err:
        process = subprocess.Popen(
            [sys.executable, "-c", LAUNCHER, RANK, how, launcher], stdout=subprocess.PIPE, stderr=err, text=True
        )
    assert process.stdout is not None
    said, pid = process.stdout.readline().split()
    assert said == str(held)
    process.kill()
    process.communicate()
    descriptor = os.pidfd_open(int(pid))
    try:
        ended = select.select([descriptor], [], [], 30 if held else 1)[0]
        assert bool(ended) is held
    finally:
        if not ended:
            os.kill(int(pid), signal.SIGKILL)
        os.close(descriptor)
    text = (tmp_path / "err").read_text()
    assert ("because its launcher, process" in text) is held
    assert "outlived" not in text
    assert "BrokenPipe" not in text
