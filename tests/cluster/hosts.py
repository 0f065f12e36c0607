"""Hosts on one machine: network namespaces on a bridge, each with its own name, address, and sshd.

What runs there meets a real network: names that resolve through /etc/hosts, ssh to start ranks, TCP between them, and
counters on the interface. Needs root and the programs of `missing`.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from launching import BIN, ROOT
from launching import ENVIRONMENT as ANYWHERE

_PROGRAMS = {"ip": "iproute2", "tc": "iproute2", "ssh": "openssh-client", "ssh-keygen": "openssh-client"}
# Here each host has room for its ranks; told to oversubscribe, Open MPI 5 puts all of them on the first.
ENVIRONMENT = {name: value for name, value in ANYWHERE.items() if "oversubscribe" not in name + value}
_PORT = 2222
_numbers = itertools.count()


def missing() -> str:
    """Why there can be no hosts here; "" if there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if not _sshd():
        return "there is no sshd (apt install openssh-server)"
    for program, package in _PROGRAMS.items():
        if shutil.which(program) is None:
            return f"there is no {program} (apt install {package})"
    probe = subprocess.run(["unshare", "--net", "--uts", "true"], capture_output=True, text=True, check=False)
    return f"network namespaces are not allowed here: {probe.stderr.strip()}" if probe.returncode else ""


def _sshd() -> str | None:
    return shutil.which("sshd") or shutil.which("sshd", path="/usr/sbin:/sbin")


def _do(*argv: str) -> str:
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout


class Hosts:
    """A context in which the named hosts exist.

    Args:
        folder: For keys, configuration and logs.
        names: Of the hosts.
    """

    def __init__(self, folder: Path, *names: str) -> None:
        self.folder = folder
        self.names = names
        number = next(_numbers)
        self._prefix = f"hvd{os.getpid()}-{number}-"
        self._switch = self._prefix + "switch"
        self._net = f"10.{200 + os.getpid() % 50}.{number % 250}"
        self._daemons: list[subprocess.Popen[str]] = []
        self._processes: list[subprocess.Popen[str]] = []
        self._closing = contextlib.ExitStack()

    def address(self, host: str) -> str:
        return f"{self._net}.{self.names.index(host) + 1}"

    def space(self, host: str) -> str:
        return self._prefix + host

    def __enter__(self) -> Hosts:
        try:
            self._build()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- life ---------------------------------------------------------------------------------------------------------

    def _build(self) -> None:
        self.own.mkdir(parents=True)
        self._space(self._switch)
        _do("ip", "-n", self._switch, "link", "add", "bridge", "type", "bridge")
        _do("ip", "-n", self._switch, "link", "set", "bridge", "up")
        table = "127.0.0.1 localhost\n" + "".join(f"{self.address(name)} {name}\n" for name in self.names)
        for name in self.names:
            space = self.space(name)
            folder = Path("/etc/netns") / space
            folder.mkdir(parents=True)
            self._closing.callback(shutil.rmtree, folder, True)
            (folder / "hosts").write_text(table)
            self._space(space)
            _do("ip", "-n", self._switch, "link", "add", f"to-{name}", "type", "veth", "peer", "eth0", "netns", space)
            _do("ip", "-n", self._switch, "link", "set", f"to-{name}", "master", "bridge", "up")
            _do("ip", "-n", space, "address", "add", f"{self.address(name)}/24", "dev", "eth0")
            _do("ip", "-n", space, "link", "set", "eth0", "up")
        self._keys()
        for name in self.names:
            self._daemon(name)
        for name in self.names:
            self._await(name)

    def _space(self, space: str) -> None:
        _do("ip", "netns", "add", space)
        self._closing.callback(lambda: subprocess.run(["ip", "netns", "del", space], check=False, capture_output=True))
        self._closing.callback(self._end_all, space)
        _do("ip", "-n", space, "link", "set", "lo", "up")

    def _keys(self) -> None:
        self.keys.mkdir()
        for key in ("id_ed25519", "ssh_host_ed25519_key"):
            _do("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.keys / key))
        public = (self.keys / "ssh_host_ed25519_key.pub").read_text()
        self.known_hosts.write_text(
            "".join(f"[{name}]:{_PORT},[{self.address(name)}]:{_PORT} {public}" for name in self.names)
        )
        # Launchers call `ssh`, and ssh looks for its configuration in the home folder of /etc/passwd; in a container that
        # is the one where the entry point writes it.
        wrapper = self.programs / "ssh"
        wrapper.parent.mkdir()
        wrapper.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F "$HOME/.ssh/config" "$@"\n')
        wrapper.chmod(0o755)

    @property
    def keys(self) -> Path:
        return self.folder / "keys"

    @property
    def known_hosts(self) -> Path:
        return self.keys / "known_hosts"

    @property
    def programs(self) -> Path:
        return self.folder / "bin"

    def environment(self, host: str) -> dict[str, str]:
        """Of processes on a host."""
        return {
            **{name: value for name, value in os.environ.items() if not name.startswith("PYTEST")},
            **ENVIRONMENT,
            "PATH": os.pathsep.join([str(self.programs), str(BIN), os.environ["PATH"]]),
            "HOME": str(self.folder / f"home-{host}"),
            "HVDTRAIN_SSH_KEYS": str(self.keys),
            "HVDTRAIN_SSH_PORT": str(_PORT),
            "HVDTRAIN_SSH_LISTEN": self.address(host),
        }

    def _daemon(self, name: str) -> None:
        """The host's sshd, started as in a container of the image."""
        (self.folder / f"home-{name}").mkdir()
        log = (self.folder / f"sshd-{name}.log").open("w")
        self._closing.callback(log.close)
        command = self.command(name, [str(ROOT / "docker" / "entrypoint.sh"), "sshd"])
        self._daemons.append(
            subprocess.Popen(
                command, env=self.environment(name), stdout=log, stderr=log, text=True, start_new_session=True
            )
        )

    def _await(self, name: str) -> None:
        end = time.monotonic() + 15
        while time.monotonic() < end:
            said = subprocess.run(
                self.command(name, ["ssh", name, "hostname"]),
                env=self.environment(name),
                capture_output=True,
                text=True,
                check=False,
            )
            if said.returncode == 0 and said.stdout.strip() == name:
                return
            time.sleep(0.1)
        log = (self.folder / f"sshd-{name}.log").read_text()
        raise RuntimeError(f"the sshd of {name} does not answer: {said.stderr}\n{log}")

    def kill_all(self) -> None:
        """End every process on the hosts."""
        for process in (*self._processes, *self._daemons):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
        for name in self.names:
            self._end_all(self.space(name))

    def close(self) -> None:
        """End every process on the hosts, and remove them."""
        self.kill_all()
        for process in (*self._processes, *self._daemons):
            process.communicate()
        self._closing.close()

    @staticmethod
    def _end_all(space: str) -> None:
        for _ in range(50):
            pids = subprocess.run(["ip", "netns", "pids", space], capture_output=True, text=True, check=False).stdout
            if not pids.strip():
                return
            for pid in pids.split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            time.sleep(0.05)

    # -- what can be done ---------------------------------------------------------------------------------------------

    def command(self, host: str, argv: list[str]) -> list[str]:
        """What runs ``argv`` on a host."""
        become = f'hostname "$0" && mount -t tmpfs own {self.own} && cd {self.own} && exec "$@"'
        return ["ip", "netns", "exec", self.space(host), "unshare", "--uts", "sh", "-c", become, host, *argv]

    @property
    def own(self) -> Path:
        """A folder that each host has for itself; programs start in it. All other folders they share."""
        return self.folder / "own"

    def begin(self, host: str, argv: list[str], **environment: str) -> subprocess.Popen[str]:
        """Start a program on a host; what it says comes by one pipe."""
        process = subprocess.Popen(
            self.command(host, argv), env={**self.environment(host), **environment}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        self._processes.append(process)
        return process

    def slow_down(self, rate: str) -> None:
        """Bound what each host can send, as ``1gbit``."""
        for name in self.names:
            queue = ["rate", rate, "burst", "256kb", "latency", "50ms"]
            _do("ip", "netns", "exec", self.space(name), "tc", "qdisc", "add", "dev", "eth0", "root", "tbf", *queue)

    def cut_off(self, host: str) -> None:
        """Pull a host's plug from the switch: nobody is told, packets just end."""
        _do("ip", "-n", self._switch, "link", "set", f"to-{host}", "down")


def launcher(hosts: Hosts, kind: str, *argv: str, each: int = 1) -> dict[str, list[str]]:
    """The command for each host that must be given one, to run a Python program with ``each`` ranks on every host."""
    python, names = sys.executable, hosts.names
    slots, ranks = ",".join(f"{name}:{each}" for name in names), str(len(names) * each)
    beside = BIN / "mpirun"
    if kind == "mpirun":
        return {
            names[0]: [
                str(beside) if beside.exists() else "mpirun",
                "--bind-to",
                "none",
                "-H",
                slots,
                "-np",
                ranks,
                python,
                *argv,
            ]
        }
    if kind.startswith("horovodrun"):
        engine = "--" + kind.removeprefix("horovodrun-")
        return {names[0]: [str(BIN / "horovodrun"), engine, "-H", slots, "-np", ranks, python, *argv]}
    where = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{names[0]}:29400", "--rdzv-id", "job"]
    one = [
        python,
        "-m",
        "torch.distributed.run",
        "--nnodes",
        str(len(names)),
        "--nproc-per-node",
        str(each),
        *where,
        *argv,
    ]
    return dict.fromkeys(names, one)
