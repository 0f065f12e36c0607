"""Record what real launchers put into the environment of the processes they start.

::

    record() { python tests/unit/launch/record.py tests/unit/launch/recorded/$1.json "${@:2}"; }
    export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1     # in a container
    record openmpi4           --versions "Open MPI 4.1.4"  -- mpirun -np 3 --oversubscribe @PROBE@
    record openmpi4_two_nodes --versions "Open MPI 4.1.4"  -- mpirun --mca plm_rsh_agent ./stand_in -H host1:2,host2:1 -np 3 @PROBE@
    record openmpi5_by_node   --versions "Open MPI 5.0.11" -- mpirun --prtemca plm_ssh_agent ./stand_in -H host1:2,host2:2 \\
                                                                     --map-by node -np 4 @PROBE@
    record mpich4_two_nodes   --versions "MPICH 4.0.2"     -- mpiexec -launcher ssh -launcher-exec ./stand_in -hosts host1:2,host2:1 \\
                                                                     -np 3 @PROBE@
    record torchrun_restart   --versions "PyTorch 2.13.0"  -- torchrun --standalone --nproc-per-node 2 --max-restarts 1 --no-python \\
                                                  bash -c '@PROBE@; sleep 1; test $TORCHELASTIC_RESTART_COUNT -gt 0'
    record horovodrun_gloo    --versions "Horovod 0.28.1"  -- horovodrun --gloo -np 3 @PROBE@
    record srun_pmi2          --versions "Slurm 22.05.8"   -- srun --mpi=pmi2 -N 3 -n 5 @PROBE@
    record sbatch_openmpi4    --versions "Slurm, Open MPI" -- sbatch --wait -N 3 -n 5 --wrap "mpirun --oversubscribe @PROBE@"

and so on: each file in ``recorded/`` holds its own command line and versions. A word ``@PROBE@``, also inside a ``bash -c``
line, becomes this file run as ``--probe FOLDER``, which writes down its own variables and its ancestors' up to this script.

All of it ran on one machine. ``stand_in`` takes the place of ssh: it drops the environment and runs the command line under
``unshare --uts`` with the other host's name, so that launchers see two hosts. Slurm had three slurmd (``slurmd -N host1``, ...)
with a port each, started in the same way, and ran most jobs for an unprivileged user, as on a real cluster: such a user
cannot read the environment of Slurm's own processes.

Only launchers' variables are kept. Secrets, user names and folders are left out; host names, addresses and programs' folders
become neutral ones (``--rename OLD=NEW``).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path

KEPT = re.compile(
    r"(RANK|WORLD_SIZE|LOCAL_(RANK|WORLD_SIZE)|(GROUP|ROLE)_(RANK|NAME|WORLD_SIZE)|MASTER_(ADDR|PORT)|HVDTRAIN_\w+|TORCHELASTIC_\w+"
    r"|PET_\w+|OMPI_\w+|PMIX_\w+|PMI_\w+|PRTE_\w+|MPI_\w+|MPIR_\w+|HYDRA_\w+|HYDI_\w+|I_MPI_\w+|GFORKER_\w+|SLURM\w*|HOROVOD_\w+)"
)
DROPPED = re.compile(
    r"\w*(SECRET|TOKEN|KEY|PASSWORD|JWT)\w*|SLURM_CONF|\w*(SCRIPT_CONTEXT|CPU_BIND\w*|PRIO_PROCESS|_UMASK)|SLURM_RLIMIT\w*"
)
ADDRESS6 = re.compile(r"\[[0-9a-f:]*::[0-9a-f:]*\]")
ADDRESS = re.compile(r"\b(?!127\.)(?!0\.)(\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3})\b")


def processes(pid: int) -> list[dict[str, object]]:
    """A process and its ancestors, nearest first, up to the recording script."""
    found: list[dict[str, object]] = []
    while pid > 0:
        environ: dict[str, str] | None
        arguments = [
            text for text in Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0") if text
        ]
        try:
            content = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
            environ = dict(entry.partition("=")[::2] for entry in content.split("\0") if "=" in entry)
        except PermissionError:
            environ = None
        if "record.py" in " ".join(arguments[:2]) and "--probe" not in arguments[:3]:
            break
        found.append({"arguments": arguments, "environ": environ})
        parent = re.search(r"^PPid:\s*(\d+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
        pid = int(parent[1]) if parent else 0
        if pid == 1:
            break
    return found


def probe(folder: Path) -> None:
    """Written by each recorded process."""
    own = processes(os.getpid())
    content = {"host": socket.gethostname(), "environ": dict(os.environ), "ancestors": own[1:]}
    temporary = folder / f".{uuid.uuid4().hex}"
    temporary.write_text(json.dumps(content))
    temporary.rename(folder / f"{uuid.uuid4().hex}.json")


def neutral(text: str, renames: dict[str, str], addresses: dict[str, str]) -> str:
    """Names, addresses and folders that say nothing about where this was recorded."""
    for old, new in renames.items():
        text = re.sub(rf"(?<![A-Za-z0-9]){re.escape(old)}(?![A-Za-z0-9])", new, text)
    text = ADDRESS6.sub("[2001:db8::1]", text)
    return ADDRESS.sub(lambda match: addresses.setdefault(match[1], f"192.0.2.{len(addresses) + 1}"), text)


def kept(environ: dict[str, str], clean: object) -> dict[str, str]:
    """Launchers' variables only."""
    names = sorted(name for name in environ if KEPT.fullmatch(name) and not DROPPED.fullmatch(name))
    return {name: clean(environ[name])[:400] for name in names}  # type: ignore[operator]


def main() -> None:
    """Run the command, collect, write."""
    if sys.argv[1:2] == ["--probe"]:
        probe(Path(sys.argv[2]))
        return
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path)
    parser.add_argument("--versions", required=True)
    parser.add_argument("--note", default="")
    parser.add_argument("--rename", action="append", default=[], help="OLD=NEW, further neutral names")
    border = sys.argv.index("--")
    options, command = parser.parse_args(sys.argv[1:border]), sys.argv[border + 1 :]
    renames = dict(item.split("=", 1) for item in options.rename)
    renames.setdefault(socket.gethostname(), "host1")
    with tempfile.TemporaryDirectory(prefix="record-") as name:
        os.chmod(name, 0o777)
        me = shlex.join([sys.executable, str(Path(__file__).resolve()), "--probe", name])
        script = [me.split() if part == "@PROBE@" else [part.replace("@PROBE@", me)] for part in command]
        done = subprocess.run([p for parts in script for p in parts], timeout=120, check=False)
        found = [json.loads(file.read_text()) for file in sorted(Path(name).glob("*.json"))]
        renames.update({me: "python child.py", name: "/tmp/job", sys.executable: "python"})
        renames.update(
            {str(Path(__file__).resolve()): "child.py", os.getcwd(): "/home/user1", str(Path.home()): "/home/user1"}
        )
    addresses: dict[str, str] = {}

    def clean(text: str) -> str:
        return neutral(text, renames, addresses)

    for process in found:
        process["host"] = clean(process["host"])
        process["environ"] = kept(process["environ"], clean)
        for ancestor in process["ancestors"]:
            ancestor["arguments"] = [clean(text)[:200] for text in ancestor["arguments"][:40]]
            if ancestor["environ"] is not None:
                ancestor["environ"] = kept(ancestor["environ"], clean)

    def order(process: dict[str, dict[str, str]]) -> list[int]:
        ranks = (
            "OMPI_COMM_WORLD_RANK",
            "PMI_RANK",
            "SLURM_PROCID",
            "HOROVOD_RANK",
            "RANK",
            "TORCHELASTIC_RESTART_COUNT",
        )
        return [int(process["environ"].get(variable, 0)) for variable in ranks]

    content = {
        "command": clean(shlex.join(command)).replace("@PROBE@", "python child.py"),
        "versions": options.versions,
        "note": options.note,
        "exit_code": done.returncode,
        "processes": sorted(found, key=order),
    }
    options.output.write_text(json.dumps(content, indent=1) + "\n")
    print(f"{options.output}: {len(found)} processes, exit code {done.returncode}")


if __name__ == "__main__":
    main()
