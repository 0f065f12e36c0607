"""One reader for each launcher: which variables it gives to each process that it starts, and what they say.

A row matches whole or not at all: variables of two launchers are never mixed. Each comment says what a launcher states
and what is derived. What was seen of the real launchers is in ``tests/unit/launch/recorded``.
"""

from __future__ import annotations

import itertools
import os
import re
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from hvdtrain.errors import LaunchError
from hvdtrain.launch.ancestry import Ancestor
from hvdtrain.launch.hostlist import hosts, tasks_per_node
from hvdtrain.settings.wording import shown
from hvdtrain.topology import Topology

Environment = Mapping[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """What a launcher's variables say; see `hvdtrain.launch.detect.Detection`. ``job`` need not be a file name yet."""

    topology: Topology
    reason: str
    job: str
    first_host: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Launcher:
    """A launcher and its reader.

    Attributes:
        name: The variables' owner, in words.
        rank: The variable that holds the rank.
        size: The variable that holds the world size.
        needs: All variables without which the rest means nothing; rank and size are among them.
        marks: Those of them that only this launcher sets: one alone means that the launcher is at work, or half set.
        read: Reads them.
        started: Whether these variables mean that ranks were started.
    """

    name: str
    rank: str
    size: str
    needs: tuple[str, ...]
    marks: tuple[str, ...]
    read: Callable[[Environment, Sequence[Ancestor]], Found]
    started: Callable[[Environment, Sequence[Ancestor]], bool] = lambda env, ancestors: True


def number(env: Environment, name: str, default: int | None = None) -> int:
    """Read a whole number; a LaunchError names the variable that holds none."""
    text = env.get(name)
    if text is None and default is not None:
        return default
    if text is None or not re.fullmatch(r"[+-]?[0-9]{1,9}", text.strip()):
        raise LaunchError(f"{name}={shown(text)} is not a whole number")
    return int(text)


def shown_value(text: str) -> str:
    """A variable's value for a message: as it is if it is a short word, else in quotes and shortened."""
    return text if text.isprintable() and " " not in text and len(text) <= 80 else shown(text)


def _is_count(text: str) -> bool:
    """Whether a variable that need not be there holds a number (``str.isdigit`` takes "²" for one, ``int`` does not)."""
    return re.fullmatch("[0-9]{1,9}", text) is not None


def address(env: Environment) -> str | None:
    """MASTER_ADDR:MASTER_PORT, if both are there; a LaunchError when the port is none."""
    host, port = env.get("MASTER_ADDR"), env.get("MASTER_PORT")
    if not host or not port:
        return None
    if not 0 < number(env, "MASTER_PORT") < 65536:
        raise LaunchError(f"MASTER_PORT={port} is not a port; use one from 1 to 65535")
    return f"{host}:{int(port)}"


def horovodrun_server(env: Environment) -> str | None:
    """host:port of the key-value server that ``horovodrun --gloo`` runs for its ranks."""
    host, port = (env.get(f"HOROVOD_GLOO_RENDEZVOUS_{part}") for part in ("ADDR", "PORT"))
    return f"{host}:{port}" if host and port else None


def may_join_by_mpi(launcher: str) -> bool:
    """Whether the ranks of a launcher may find each other through MPI, and speak through it to the user's terminal."""
    return launcher in ("mpirun", "srun", "horovodrun")


def node_of(topology: Topology) -> int | str:
    """What tells a rank's node from the others: the launcher's number, or where that may be derived, the host's name."""
    return topology.node_rank if topology.launcher in ("torchrun", "srun") else socket.gethostname()


def _place(
    launcher: str, *, rank: int, size: int, local_rank: int, local_size: int, node: int | None, nodes: int | None
) -> Topology:
    """A topology where the nodes may be unknown (None), then derived from an even spread, ranks filling node by node.

    One thing is certain without being told: there is one node exactly when all ranks are on this one.
    """
    if not 0 < local_size < size:
        node, nodes = 0, 1  # all on one node; or contradictory, which Topology refuses
    elif nodes is None:
        nodes = min(max(-(-size // local_size), 1 + (node or 0)), 1 + size - local_size)
    node = min(rank // local_size, nodes - 1) if node is None else node
    return Topology(
        rank=rank,
        world_size=size,
        local_rank=local_rank,
        local_world_size=local_size,
        node_rank=node,
        num_nodes=nodes,
        launcher=launcher,
    )


def _spawn(env: Environment, ancestors: Sequence[Ancestor]) -> Found:
    topology = _place(
        "spawn",
        rank=number(env, "HVDTRAIN_RANK"),
        size=number(env, "HVDTRAIN_WORLD_SIZE"),
        local_rank=number(env, "HVDTRAIN_LOCAL_RANK"),
        local_size=number(env, "HVDTRAIN_LOCAL_WORLD_SIZE"),
        node=None,
        nodes=None,
    )
    return Found(topology=topology, reason=f"spawn: HVDTRAIN_RANK={topology.rank}", job=env["HVDTRAIN_JOB_ID"])


def spawned(rank: int, world_size: int, job: str) -> dict[str, str]:
    """The variables that `hvdtrain.spawn`, a launcher itself, gives to each of its ranks, all on one node."""
    values = (rank, world_size, rank, world_size)
    return {**dict(zip(_SPAWN, map(str, values), strict=True)), "HVDTRAIN_JOB_ID": f"spawn-{job}"}


def _torchrun(env: Environment, ancestors: Sequence[Ancestor]) -> Found:
    # Everything is stated. "Nodes" are torchrun's agents, of which there may be two on one machine. The run id alone
    # is no job id: without --rdzv-id or --standalone it is "none" for everybody.
    topology = Topology(
        rank=number(env, "RANK"),
        world_size=number(env, "WORLD_SIZE"),
        local_rank=number(env, "LOCAL_RANK"),
        local_world_size=number(env, "LOCAL_WORLD_SIZE"),
        node_rank=number(env, "GROUP_RANK"),
        num_nodes=number(env, "GROUP_WORLD_SIZE"),
        launcher="torchrun",
    )
    restart = env.get("TORCHELASTIC_RESTART_COUNT", "0")
    return Found(
        topology=topology,
        reason=f"torchrun: RANK={topology.rank}" + (f", restart {shown_value(restart)}" if restart != "0" else ""),
        job=f"torchrun-{env['TORCHELASTIC_RUN_ID']}-{env['MASTER_ADDR']}-{env['MASTER_PORT']}-{restart}",
    )


# `horovodrun --mpi` sets no HOROVOD_ variable. One that `hvdtrain install-horovod` built says who it is; of others, these
# are what it gives to Open MPI 4. mpirun hands them to every rank on every node, so that all ranks agree; a HOROVOD_
# variable from somebody's shell is on the first node only.
LAUNCHER_VARIABLE = "HVDTRAIN_LAUNCHER"
_HOROVODRUN_MPI = {
    "OMPI_MCA_pml": "ob1",
    "OMPI_MCA_btl": "^openib",
    "OMPI_MCA_orte_tag_output": "1",
    "OMPI_MCA_hwloc_base_binding_policy": "none",
    "OMPI_MCA_rmaps_base_mapping_policy": "slot",
}


def _mpirun_or_horovodrun(env: Environment) -> str:
    told = env.get(LAUNCHER_VARIABLE) == "horovodrun"
    recognised = all(env.get(name) == value for name, value in _HOROVODRUN_MPI.items())
    return "horovodrun" if told or recognised else "mpirun"


def _open_mpi(env: Environment, ancestors: Sequence[Ancestor]) -> Found:
    rank, size = number(env, "OMPI_COMM_WORLD_RANK"), number(env, "OMPI_COMM_WORLD_SIZE")
    local = number(env, "OMPI_COMM_WORLD_LOCAL_SIZE")
    launcher = _mpirun_or_horovodrun(env)
    # OMPI_COMM_WORLD_NODE_RANK is no node's number but the local rank once more. Open MPI 4 states how many nodes
    # hold ranks; Open MPI 5 does not.
    nodes = number(env, "OMPI_MCA_orte_num_nodes") if "OMPI_MCA_orte_num_nodes" in env else None
    topology = _place(
        launcher,
        rank=rank,
        size=size,
        local_rank=number(env, "OMPI_COMM_WORLD_LOCAL_RANK"),
        local_size=local,
        node=_open_mpi_node(env, ancestors, nodes or (-(-size // local) if local > 0 else 1)),
        nodes=nodes,
    )
    # The name space holds mpirun's host and process in Open MPI 5; in 4 it is a 16-bit hash of them, and the random
    # "transports" key, equal on all ranks, keeps two jobs apart.
    names = ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "OMPI_MCA_orte_precondition_transports")
    job = "-".join(env[name] for name in names if name in env)
    return Found(
        topology=topology,
        reason=f"{launcher}: OMPI_COMM_WORLD_RANK={rank}",
        job=f"mpirun-{job or _parent(env, size, local)}",
    )


def _open_mpi_node(env: Environment, ancestors: Sequence[Ancestor], nodes: int) -> int | None:
    """Number of this node, derived: the address of its daemon ends in ".N;", mpirun being daemon 0.

    mpirun's own node holds ranks or not; where it does not, there is one daemon more than nodes. None: cannot be told.
    """
    contact = (
        env.get("OMPI_MCA_orte_local_daemon_uri") or env.get("PMIX_SERVER_URI41") or env.get("PMIX_SERVER_URI2", "")
    )
    match = re.search(r"\.([0-9]{1,9});", contact)
    if match is None:
        return None
    daemon = int(match[1])
    if daemon == 0:
        return 0
    count = env.get("OMPI_MCA_ess_base_num_procs") or next(
        (found for a in ancestors if (found := a.option("ess_base_num_procs"))), ""
    )
    if not _is_count(count) or int(count) - nodes not in (0, 1):
        return None
    node = daemon - (int(count) - nodes)
    return node if 0 <= node < nodes else None


def _hydra(env: Environment, ancestors: Sequence[Ancestor]) -> Found:
    # MPICH, Intel MPI, MVAPICH: how many nodes there are is derived from an even spread. Other process managers set
    # PMI_RANK without MPI_LOCALNRANKS (Cray's sets PMI_LOCAL_SIZE).
    rank, size = number(env, "PMI_RANK"), number(env, "PMI_SIZE")
    known = next((p for p in _LOCAL_PMI if p[0] in env and p[1] in env), None)
    local = number(env, known[1]) if known else 1
    proxy = next((a for a in ancestors if a.program == "hydra_pmi_proxy"), None)
    node = env.get("HYDRA_BSTRAP_PROXY_ID") or (proxy.option("--proxy-id") if proxy else None) or ""
    launcher = _mpirun_or_horovodrun(env)
    topology = _place(
        launcher,
        rank=rank,
        size=size,
        local_rank=number(env, known[0]) if known else 0,
        local_size=local,
        node=int(node) if _is_count(node) else None,
        nodes=None,
    )
    # Only Intel MPI names the job to its ranks. MPICH's proxies are told mpiexec's address, the same on every node.
    job = (proxy.option("--control-port") if proxy else None) or env.get("I_MPI_HYDRA_UUID")
    return Found(
        topology=topology,
        reason=f"{launcher} (Hydra): PMI_RANK={rank}"
        + ("" if known else "; no MPI_LOCALRANKID, so one rank a node is assumed"),
        job=f"hydra-{job or _parent(env, size, local)}",
    )


_LOCAL_PMI = (("MPI_LOCALRANKID", "MPI_LOCALNRANKS"), ("PMI_LOCAL_RANK", "PMI_LOCAL_SIZE"))


def _is_not_srun(env: Environment, ancestors: Sequence[Ancestor]) -> bool:
    # srun sets PMI_RANK itself when its MPI plugin is PMI (the classic trap): then Slurm's own variables say more.
    if any(p[0] in env for p in _LOCAL_PMI):
        return True
    return not _is_srun_step(env, ancestors) and not was_left_by_srun(env, ancestors)


def _slurm(env: Environment, ancestors: Sequence[Ancestor]) -> Found:
    # Everything is stated. The step's variables, not the job's: srun may have started fewer tasks than were allocated.
    rank, node, size = number(env, "SLURM_PROCID"), number(env, "SLURM_NODEID"), number(env, "SLURM_STEP_NUM_TASKS")
    counts = env["SLURM_STEP_TASKS_PER_NODE"]
    per_node = tasks_per_node(counts)
    if sum(per_node) != size or not 0 <= node < len(per_node):
        raise LaunchError(
            f"SLURM_STEP_TASKS_PER_NODE={shown_value(counts)} fits neither SLURM_STEP_NUM_TASKS={size} nor SLURM_NODEID={node}"
        )
    topology = Topology(
        rank=rank,
        world_size=size,
        local_rank=number(env, "SLURM_LOCALID"),
        local_world_size=per_node[node],
        node_rank=node,
        num_nodes=len(per_node),
        launcher="srun",
    )
    step = f"{env['SLURM_JOB_ID']}.{env['SLURM_STEP_ID']}.{env.get('SLURM_RESTART_COUNT', '0')}"
    return Found(
        topology=topology,
        reason=f"srun: SLURM_PROCID={rank}",
        job=f"srun-{step}",
        first_host=hosts(env["SLURM_STEP_NODELIST"])[0],  # every distribution puts task 0 on the step's first node
    )


def _is_srun_step(env: Environment, ancestors: Sequence[Ancestor]) -> bool:
    """Whether srun started this process as one of several tasks.

    A batch script has SLURM_PROCID=0, SLURM_NTASKS=N and no step; an salloc shell has SLURM_NTASKS only, or a step
    with a number near 2**32 and one task. A job submitted from inside a step inherits that step's variables: then the
    title of Slurm's own process, where it can be seen, tells that this is a batch script. (SLURM_TASK_PID tells
    nothing: a batch script has one, too.)
    """
    if was_left_by_srun(env, ancestors):
        return False
    step = slurm_step_number(env)
    return step is not None and step < 0xFFFF0000 and env.get("SLURM_STEP_NUM_TASKS") != "1"


def was_left_by_srun(env: Environment, ancestors: Sequence[Ancestor]) -> bool:
    """Whether the process tree shows that a step's variables are not this process's own."""
    started_by = next((a.slurm_step for a in ancestors if a.slurm_step is not None), None)
    if started_by is not None and not re.fullmatch("[0-9]+", started_by):
        return True
    # srun -n 4 --pty bash: somebody types in the shell of task 0, and nobody in the others
    return "SLURM_PTY_PORT" in env and _under_typed_shell(ancestors)


def slurm_step_number(env: Environment) -> int | None:
    """The number of Slurm's step; None where there is none, or none that could be one."""
    step = env.get("SLURM_STEP_ID", "")
    return int(step) if re.fullmatch("[0-9]{1,10}", step) else None


def _under_typed_shell(ancestors: Sequence[Ancestor]) -> bool:
    """Whether the task itself is a shell that was given neither a script nor a command."""
    for task, above in itertools.pairwise(ancestors):
        if above.slurm_step is not None:
            options = task.arguments[1:]
            shell = task.program.lstrip("-").endswith("sh")
            return shell and all(option.startswith("-") for option in options)
    return False


def _horovod_gloo(env: Environment, ancestors: Sequence[Ancestor]) -> Found:
    # "Cross" counts the nodes that have a rank with this local rank: with 1 and 2 ranks on two nodes, rank 2 is told
    # that it is 0 of 1. Only local rank 0, or an even spread, knows all nodes.
    size, local = number(env, "HOROVOD_SIZE"), number(env, "HOROVOD_LOCAL_SIZE")
    local_rank, nodes = number(env, "HOROVOD_LOCAL_RANK"), number(env, "HOROVOD_CROSS_SIZE")
    certain = local_rank == 0 or nodes * local == size
    topology = _place(
        "horovodrun",
        rank=number(env, "HOROVOD_RANK"),
        size=size,
        local_rank=local_rank,
        local_size=local,
        node=number(env, "HOROVOD_CROSS_RANK") if certain else None,
        nodes=nodes if certain else None,
    )
    server = horovodrun_server(env)
    job = "-".join(server.rsplit(":", 1)) if server else _parent(env, size, local)
    return Found(topology=topology, reason=f"horovodrun: HOROVOD_RANK={topology.rank}", job=f"horovodrun-{job}")


def _plain(env: Environment, ancestors: Sequence[Ancestor]) -> Found:
    # Also a Kubernetes PyTorchJob: its pods have RANK, WORLD_SIZE and MASTER_*, no LOCAL_*, mostly one rank a pod.
    rank, size = number(env, "RANK"), number(env, "WORLD_SIZE")
    name = "pytorchjob" if "KUBERNETES_SERVICE_HOST" in env else "environment"
    local_rank, local, assumed = _plain_local(env, rank, size)
    meeting = address(env)
    missing = [variable for variable in ("MASTER_ADDR", "MASTER_PORT") if variable not in env]
    if size > 1 and (len(missing) == 1 or (missing and local != size)):
        raise LaunchError(f"{' and '.join(missing)} must name rank 0's host and a free port there, and are missing")
    topology = _place(name, rank=rank, size=size, local_rank=local_rank, local_size=local, node=None, nodes=None)
    job = meeting or _parent(env, size, local)
    return Found(topology=topology, reason=f"{name}: RANK={rank}{assumed}", job=f"{name}-{job}")


def _plain_local(env: Environment, rank: int, size: int) -> tuple[int, int, str]:
    """Local rank, local world size, and in words what had to be assumed."""
    name = next((each for each in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE") if each in env), None)  # DeepSpeed's is the second
    if "LOCAL_RANK" in env:
        local_rank = number(env, "LOCAL_RANK")
        if name is not None:
            return local_rank, number(env, name), ""
        if rank != local_rank:  # more than one node, and nothing tells how many ranks are on this one
            raise LaunchError(f"LOCAL_WORLD_SIZE is missing, which RANK={rank} with LOCAL_RANK={local_rank} needs")
        return local_rank, size, "; no LOCAL_WORLD_SIZE, so one node is assumed"
    if name is not None and number(env, name) != 1:
        raise LaunchError(f"LOCAL_RANK is missing, which {name}={shown_value(env[name])} needs")
    per_pod = env.get("PET_NPROC_PER_NODE", "")
    if _is_count(per_pod) and int(per_pod) > 1:
        raise LaunchError(
            f"PET_NPROC_PER_NODE={per_pod} asks for {per_pod} processes in this pod, and python is one; let the pod's "
            "command be 'torchrun -m hvdtrain', which reads the PET_ variables"
        )
    return 0, 1, "" if name is not None or size == 1 else "; no LOCAL_RANK, so one rank a node is assumed"


def _parent(env: Environment, size: int, local: int) -> str:
    """Something that the ranks of one job share where nothing names the job: their parent, if all are on this node."""
    chosen = env.get("HVDTRAIN_JOB_ID")
    return chosen or (f"parent{os.getppid()}" if size == local else f"user{os.getuid()}-{size}")


_SLURM = (
    "SLURM_PROCID",
    "SLURM_LOCALID",
    "SLURM_NODEID",
    "SLURM_JOB_ID",
    "SLURM_STEP_ID",
    "SLURM_STEP_NUM_TASKS",
    "SLURM_STEP_TASKS_PER_NODE",
    "SLURM_STEP_NODELIST",
)
_SPAWN = ("HVDTRAIN_RANK", "HVDTRAIN_WORLD_SIZE", "HVDTRAIN_LOCAL_RANK", "HVDTRAIN_LOCAL_WORLD_SIZE")
_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE")
_OPEN_MPI = tuple(f"OMPI_COMM_WORLD_{part}" for part in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"))
_HOROVOD = tuple(f"HOROVOD_{part}" for part in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE"))

# Where two launchers' variables are there and the process tree does not tell which is nearer, the earlier row wins:
# what is more often started inside the other comes first.
LAUNCHERS: tuple[Launcher, ...] = (
    Launcher(
        name="spawn",
        rank="HVDTRAIN_RANK",
        size="HVDTRAIN_WORLD_SIZE",
        needs=(*_SPAWN, "HVDTRAIN_JOB_ID"),
        marks=_SPAWN,
        read=_spawn,
    ),
    Launcher(
        name="torchrun",
        rank="RANK",
        size="WORLD_SIZE",
        needs=("TORCHELASTIC_RUN_ID", *_TORCHRUN, "MASTER_ADDR", "MASTER_PORT"),
        marks=("TORCHELASTIC_RUN_ID",),
        read=_torchrun,
    ),
    Launcher(name="mpirun", rank=_OPEN_MPI[0], size=_OPEN_MPI[1], needs=_OPEN_MPI, marks=_OPEN_MPI, read=_open_mpi),
    Launcher(name="horovodrun", rank=_HOROVOD[0], size=_HOROVOD[1], needs=_HOROVOD, marks=_HOROVOD, read=_horovod_gloo),
    Launcher(
        name="mpirun (Hydra)",
        rank="PMI_RANK",
        size="PMI_SIZE",
        needs=("PMI_RANK", "PMI_SIZE"),
        marks=("PMI_RANK", "PMI_SIZE"),
        read=_hydra,
        started=_is_not_srun,
    ),
    Launcher(
        name="srun",
        rank="SLURM_PROCID",
        size="SLURM_STEP_NUM_TASKS",
        needs=_SLURM,
        marks=("SLURM_STEP_NUM_TASKS",),
        read=_slurm,
        started=_is_srun_step,
    ),
    Launcher(
        name="environment",
        rank="RANK",
        size="WORLD_SIZE",
        needs=("RANK", "WORLD_SIZE"),
        marks=("RANK", "WORLD_SIZE"),
        read=_plain,
        started=lambda env, ancestors: "TORCHELASTIC_RUN_ID" not in env,  # then RANK is torchrun's
    ),
)
