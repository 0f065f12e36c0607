"""From the environment to the topology, and why. The only place that reads launchers' variables.

Where the variables of several launchers are there (mpirun inside an sbatch allocation, torchrun inside srun), the
innermost launcher counts: the one that started this process. A launcher sets its variables for its children only, so
the innermost is the one whose variables are missing, or different, in the nearest ancestor process.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hvdtrain.errors import LaunchError
from hvdtrain.launch.launchers import LAUNCHERS, Environment, Found, Launcher
from hvdtrain.topology import Topology

_MAX_ANCESTORS = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class Detection:
    """What the environment says about this process.

    Attributes:
        topology: Its place among the ranks.
        reason: The variable that told, for people.
        job_id: Equal on all ranks of one job, different for two jobs at the same time; a file name.
        address: "host:port" where MASTER_ADDR and MASTER_PORT name a meeting point.
        first_host: Rank 0's host, where the environment tells.
    """

    topology: Topology
    reason: str
    job_id: str
    address: str | None = None
    first_host: str | None = None


def detect(
    environ: Mapping[str, str] | None = None, *, ancestors: Sequence[Mapping[str, str]] | None = None
) -> Detection:
    """Find out how this process was started.

    Args:
        environ: Read instead of this process's environment; then the process tree is not looked at.
        ancestors: Environments of parent, grandparent, ..., to go with ``environ``.

    Raises:
        LaunchError: Variables are missing or contradict each other; says what was found and what is missing.
    """
    env: Environment = os.environ if environ is None else environ
    present = [launcher for launcher in LAUNCHERS if any(m in env for m in launcher.marks) and launcher.applies(env)]
    # RANK is torchrun's, too; on its own it is a launcher only if no other speaks.
    others = [launcher for launcher in present if launcher.name != "environment"]
    present = others or present
    if not present:
        if "WORLD_SIZE" in env and env["WORLD_SIZE"] not in ("", "1"):
            raise LaunchError(
                f"found WORLD_SIZE={env['WORLD_SIZE']}, missing RANK; set RANK too, or unset WORLD_SIZE to run one process"
            )
        single = Topology.single()
        return Detection(topology=single, reason="no launcher's variables found", job_id=f"single-{os.getpid()}")
    if len(present) > 1:
        tree = ancestors if ancestors is not None else _ancestors() if environ is None else []
        present = _innermost(present, env, tree)
    launcher = present[0]
    missing = [name for name in launcher.needs if name not in env]
    if missing:
        found = [f"{name}={env[name]}" for name in (*launcher.marks, *launcher.needs) if name in env]
        raise LaunchError(
            f"{launcher.name} is half set: found {', '.join(found)}, missing {', '.join(missing)}. Start through the launcher, or "
            f"unset {', '.join(m for m in launcher.marks if m in env)} to run one process"
        )
    return _finished(launcher.read(env), launcher)


def _innermost(present: list[Launcher], env: Environment, tree: Sequence[Environment]) -> list[Launcher]:
    """Order launchers by how near the process is to which they first gave their variables."""

    def depth(launcher: Launcher) -> int:
        for generation, ancestor in enumerate(tree):
            if any(ancestor.get(mark) != env.get(mark) for mark in launcher.marks if mark in env):
                return generation
        return len(tree)

    return sorted(present, key=depth)  # stable: the table's order decides what the tree does not


def _ancestors() -> list[Environment]:
    """Environments of parent, grandparent, ..., as far as they can be read."""
    found: list[Environment] = []
    pid = os.getppid()
    while pid > 1 and len(found) < _MAX_ANCESTORS:
        try:
            content = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
            status = Path(f"/proc/{pid}/status").read_text(errors="replace")
        except OSError:
            break
        found.append(dict(entry.partition("=")[::2] for entry in content.split("\0") if entry))
        parent = re.search(r"^PPid:\s*(\d+)", status, re.MULTILINE)
        pid = int(parent[1]) if parent else 0
    return found


def _finished(found: Found, launcher: Launcher) -> Detection:
    job_id = found.job_id
    if launcher.name == "mpirun (Hydra)" and found.topology.num_nodes == 1:
        job_id = f"{job_id}-{_process_named('hydra_pmi_proxy') or os.getppid()}"
    safe = re.sub(r"[^A-Za-z0-9._-]", "_", job_id)
    if safe != job_id:
        safe = f"{safe[:80]}-{zlib.crc32(job_id.encode()):08x}"
    return Detection(
        topology=found.topology, reason=found.reason, job_id=safe, address=found.address, first_host=found.first_host
    )


def _process_named(name: str) -> int | None:
    """The nearest ancestor with that command, which all ranks on a node share."""
    pid = os.getppid()
    while pid > 1:
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            return None
        command, _, rest = stat.partition("(")[2].rpartition(")")
        if name.startswith(command) and command:
            return pid
        pid = int(rest.split()[1])
    return None
