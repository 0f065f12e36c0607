"""A real Slurm on one machine: munged, slurmctld, and a slurmd for each of two nodes, all gone afterwards."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from launching import BIN, ENVIRONMENT

_PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "scontrol", "scancel", "sinfo")
_PATH = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])


def missing() -> str:
    """Why there can be no Slurm here; "" if there can."""
    if os.geteuid() != 0:
        return "Slurm's daemons need root here"
    for program in _PROGRAMS:
        if shutil.which(program, path=_PATH) is None:
            return f"there is no {program} (apt install slurm-wlm munge)"
    return ""


@contextlib.contextmanager
def cluster() -> Iterator[Slurm]:
    """A Slurm in a folder of its own."""
    place = tempfile.TemporaryDirectory(prefix="hvd-slurm-", dir="/tmp", ignore_cleanup_errors=True)
    with place as folder, Slurm(Path(folder) / "s") as running:
        yield running


class Slurm:
    """A context with a cluster of two nodes, which are this machine under two names.

    Args:
        folder: For configuration, spool and logs. Its path must be short: it holds a socket.
    """

    nodes = ("node1", "node2")

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Slurm:
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "PYTEST"))}
        path = os.pathsep.join([str(BIN), _PATH])
        return {**kept, **ENVIRONMENT, "PATH": path, "SLURM_CONF": str(self.folder / "slurm.conf")}

    def _start(self) -> None:
        folder = self.folder
        for name in ("state", "log", "own", *(f"spool-{node}" for node in self.nodes)):
            (folder / name).mkdir(parents=True)
        (folder / "hosts").write_text("127.0.0.1 localhost " + " ".join(self.nodes) + "\n")
        key, socket = folder / "munge.key", folder / "munge.socket"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        port = 20000 + os.getpid() % 20000
        lines = [f"NodeName={node} NodeAddr=127.0.0.1 NodeHostname={node} Port={port + 2 + index} CPUs=8 RealMemory=2000"
                 for index, node in enumerate(self.nodes)]  # fmt: skip
        (folder / "slurm.conf").write_text(
            f"""ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={socket}
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
TmpFS={folder}/own
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
KillWait=5
MinJobAge=300
SlurmctldPort={port}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/log/slurmctld
SlurmdLogFile={folder}/log/slurmd-%n
{chr(10).join(lines)}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
        )
        self._daemon("munged", "-F", "--force", f"--key-file={key}", f"--socket={socket}", f"--pid-file={folder}/munged.pid",
                     f"--log-file={folder}/log/munged", f"--seed-file={folder}/munge.seed")  # fmt: skip
        self._until(socket.exists, "munged")
        self._daemon("slurmctld", "-D", "-i", "-f", str(folder / "slurm.conf"))
        for node in self.nodes:
            self._daemon("slurmd", "-D", "-N", node, "-f", str(folder / "slurm.conf"), node=node)
        self._until(lambda: self.ask("sinfo", "-h", "-o", "%T").split() == ["idle"], "two idle nodes")

    def _daemon(self, *argv: str, node: str = "") -> None:
        log = (self.folder / "log" / f"{argv[0]}-{len(self._daemons)}.out").open("wb")
        program = shutil.which(argv[0], path=_PATH) or argv[0]
        become: list[str] = []
        if node:  # its own name, its own folder for PMIx's sockets, and names for both nodes
            words = f"hostname {node} && mount -t tmpfs own {self.folder}/own && mount --bind {self.folder}/hosts /etc/hosts"
            become = ["unshare", "--uts", "--mount", "sh", "-c", f'{words} && exec "$0" "$@"']
        self._daemons.append(
            subprocess.Popen(
                [*become, program, *argv[1:]], env=self.environment, stdout=log, stderr=log, start_new_session=True
            )
        )
        log.close()

    def _until(self, true: object, what: str, limit_s: float = 30) -> None:
        end = time.monotonic() + limit_s
        while time.monotonic() < end:
            if true():  # type: ignore[operator]
                return
            time.sleep(0.2)
        logs = "\n".join(
            f"{file.name}: {file.read_text(errors='replace')[-1500:]}" for file in (self.folder / "log").iterdir()
        )
        raise RuntimeError(f"Slurm: no {what} within {limit_s:g} s\n{logs}")

    def close(self) -> None:
        """Cancel what runs, and end the daemons."""
        with contextlib.suppress(RuntimeError, OSError):
            self.ask("scancel", "--state=RUNNING")
            self.ask("scancel", "--state=PENDING")
            time.sleep(1)
        for process in reversed(self._daemons):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
        for process in self._daemons:
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    # -- jobs ---------------------------------------------------------------------------------------------------------

    def ask(self, *argv: str, **environment: str) -> str:
        """Run one of Slurm's commands; what it prints."""
        env = {**self.environment, **environment}
        ended = subprocess.run(argv, env=env, capture_output=True, text=True, check=False, timeout=30, cwd=self.folder)
        if ended.returncode:
            raise RuntimeError(f"{' '.join(argv)}: {ended.stderr}")
        return ended.stdout

    def submit(self, *argv: str, **environment: str) -> str:
        """Submit a job; its number."""
        return self.ask("sbatch", "--parsable", *argv, **environment).strip()

    def state(self, job: str) -> dict[str, str]:
        """What ``scontrol show job`` says."""
        return dict(word.split("=", 1) for word in self.ask("scontrol", "show", "job", job).split() if "=" in word)
