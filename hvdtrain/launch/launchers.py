"""One reader a launcher: which variables it sets for each process, and what they say.

A reader matches whole or not at all. ``marks`` are the variables that only this launcher gives to a process it starts,
so they tell whether it started this one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from hvdtrain.errors import LaunchError
from hvdtrain.launch.hostlist import hosts, tasks_per_node
from hvdtrain.topology import Topology

Environment = Mapping[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """What a launcher's variables say; see `hvdtrain.launch.detect.Detection`."""

    topology: Topology
    reason: str
    job_id: str
    address: str | None = None
    first_host: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Launcher:
    """A launcher and its reader.

    Attributes:
        name: As users call it.
        marks: Variables of which at least one names this process's rank.
        needs: Variables without which the rest means nothing.
        read: Reads them.
        applies: Whether the marks really mean that this launcher started a job of ranks.
    """

    name: str
    marks: tuple[str, ...]
    needs: tuple[str, ...]
    read: Callable[[Environment], Found]
    applies: Callable[[Environment], bool] = lambda env: True


def number(env: Environment, name: str, default: int | None = None) -> int:
    """Read a whole number; a LaunchError names the variable that holds none."""
    text = env.get(name)
    if text is None and default is not None:
        return default
    try:
        return int(text or "")
    except ValueError:
        raise LaunchError(f"{name}={text!r} is not a whole number; unset it, or start through a launcher") from None


def address(env: Environment) -> str | None:
    """MASTER_ADDR:MASTER_PORT, if both are there."""
    host, port = env.get("MASTER_ADDR"), env.get("MASTER_PORT")
    if not host or not port:
        return None
    if not 0 < number(env, "MASTER_PORT") < 65536:
        raise LaunchError(f"MASTER_PORT={port!r} is not a port; use one from 1 to 65535")
    return f"{host}:{port}"


def _spawn(env: Environment) -> Found:
    size = number(env, "HVDTRAIN_LOCAL_WORLD_SIZE")
    topology = Topology(
        rank=number(env, "HVDTRAIN_RANK"),
        world_size=number(env, "HVDTRAIN_WORLD_SIZE"),
        local_rank=number(env, "HVDTRAIN_LOCAL_RANK"),
        local_world_size=size,
        node_rank=number(env, "HVDTRAIN_RANK") // size,
        num_nodes=max(1, number(env, "HVDTRAIN_WORLD_SIZE") // size),
        launcher="spawn",
    )
    return Found(topology=topology, reason=f"spawn: HVDTRAIN_RANK={topology.rank}", job_id=env["HVDTRAIN_JOB_ID"])


def _torchrun(env: Environment) -> Found:
    local = number(env, "LOCAL_WORLD_SIZE")
    topology = Topology(
        rank=number(env, "RANK"),
        world_size=number(env, "WORLD_SIZE"),
        local_rank=number(env, "LOCAL_RANK"),
        local_world_size=local,
        node_rank=number(env, "GROUP_RANK"),
        num_nodes=number(env, "GROUP_WORLD_SIZE", max(1, number(env, "WORLD_SIZE") // local)),
        launcher="torchrun",
    )
    restart = env.get("TORCHELASTIC_RESTART_COUNT", "0")
    return Found(
        topology=topology,
        reason=f"torchrun: RANK={topology.rank}" + (f", restart {restart}" if restart != "0" else ""),
        job_id=f"torchrun-{env['TORCHELASTIC_RUN_ID']}-{env.get('MASTER_PORT', '')}-{restart}",
        address=address(env),
    )


def _open_mpi(env: Environment) -> Found:
    rank, size = number(env, "OMPI_COMM_WORLD_RANK"), number(env, "OMPI_COMM_WORLD_SIZE")
    local = number(env, "OMPI_COMM_WORLD_LOCAL_SIZE")
    # Open MPI 4 says how many nodes there are; 5 does not, and then an even spread is assumed.
    nodes = number(env, "OMPI_MCA_orte_num_nodes", -(-size // local))
    nodes = min(max(1, nodes), size)
    by_horovod = "HOROVOD_RANK" not in env and any(name.startswith("HOROVOD_") for name in env)
    launcher = "horovodrun" if by_horovod else "mpirun"
    topology = Topology(
        rank=rank,
        world_size=size,
        local_rank=number(env, "OMPI_COMM_WORLD_LOCAL_RANK"),
        local_world_size=local,
        node_rank=min(rank // local, nodes - 1),
        num_nodes=nodes,
        launcher=launcher,
    )
    job = env.get("PMIX_NAMESPACE") or env.get("OMPI_MCA_ess_base_jobid") or env.get("OMPI_MCA_orte_hnp_uri", "")
    return Found(
        topology=topology,
        reason=f"{launcher}: OMPI_COMM_WORLD_RANK={rank}",
        job_id=f"mpirun-{job}",
        address=address(env),
    )


def _hydra(env: Environment) -> Found:
    rank, size = number(env, "PMI_RANK"), number(env, "PMI_SIZE")
    local = number(env, "MPI_LOCALNRANKS", size)
    topology = Topology(
        rank=rank,
        world_size=size,
        local_rank=number(env, "MPI_LOCALRANKID", rank),
        local_world_size=local,
        node_rank=rank // local,
        num_nodes=max(1, -(-size // local)),
        launcher="mpirun",
    )
    # Hydra names no job: its processes share a parent, the proxy, which `detect` adds on one node.
    return Found(topology=topology, reason=f"mpirun (Hydra): PMI_RANK={rank}", job_id="hydra", address=address(env))


def _slurm(env: Environment) -> Found:
    rank, node = number(env, "SLURM_PROCID"), number(env, "SLURM_NODEID", 0)
    size = number(env, "SLURM_STEP_NUM_TASKS", number(env, "SLURM_NTASKS", 1))
    per_node = tasks_per_node(env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE") or str(size))
    nodes = hosts(env.get("SLURM_STEP_NODELIST") or env.get("SLURM_NODELIST") or "")
    if node >= len(per_node):
        raise LaunchError(
            f"srun: SLURM_NODEID={node}, but the task counts {per_node} name {len(per_node)} nodes; the Slurm variables contradict each other"
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
    job = "-".join(env.get(name, "0") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT"))
    return Found(
        topology=topology,
        reason=f"srun: SLURM_PROCID={rank}",
        job_id=f"slurm-{job}",
        address=address(env),
        first_host=nodes[0] if nodes else None,
    )


def _is_srun_step(env: Environment) -> bool:
    """A batch script and an salloc shell have Slurm's variables too, but no numbered step started them."""
    step = env.get("SLURM_STEP_ID", "")
    tasks = env.get("SLURM_STEP_NUM_TASKS", "")
    return step.isdigit() and int(step) < 0xFFFFFFF0 and tasks not in ("", "1")


def _horovod_gloo(env: Environment) -> Found:
    topology = Topology(
        rank=number(env, "HOROVOD_RANK"),
        world_size=number(env, "HOROVOD_SIZE"),
        local_rank=number(env, "HOROVOD_LOCAL_RANK"),
        local_world_size=number(env, "HOROVOD_LOCAL_SIZE"),
        node_rank=number(env, "HOROVOD_CROSS_RANK"),
        num_nodes=number(env, "HOROVOD_CROSS_SIZE"),
        launcher="horovodrun",
    )
    meeting = f"{env.get('HOROVOD_GLOO_RENDEZVOUS_ADDR', '')}-{env.get('HOROVOD_GLOO_RENDEZVOUS_PORT', '')}"
    return Found(
        topology=topology,
        reason=f"horovodrun: HOROVOD_RANK={topology.rank}",
        job_id=f"horovodrun-{meeting}",
        address=address(env),
    )


def _plain(env: Environment) -> Found:
    rank, size = number(env, "RANK"), number(env, "WORLD_SIZE")
    known = "LOCAL_RANK" in env
    local = number(env, "LOCAL_WORLD_SIZE", size if known else 1)
    meeting = address(env)
    if meeting is None and size > 1:
        raise LaunchError(
            f"found RANK={rank} and WORLD_SIZE={size}, missing MASTER_ADDR and MASTER_PORT (rank 0's host and a free port there); "
            "set them, or start through torchrun"
        )
    kubernetes = "KUBERNETES_SERVICE_HOST" in env
    name = "pytorchjob" if kubernetes else "environment"
    topology = Topology(
        rank=rank,
        world_size=size,
        local_rank=number(env, "LOCAL_RANK", 0),
        local_world_size=local,
        node_rank=rank // local,
        num_nodes=max(1, size // local),
        launcher=name,
    )
    assumed = "" if known else "; no LOCAL_RANK, so one process a node is assumed"
    return Found(topology=topology, reason=f"{name}: RANK={rank}{assumed}", job_id=f"plain-{meeting}", address=meeting)


# Where two launchers' variables are both there and the process tree does not tell, the earlier row wins.
LAUNCHERS: tuple[Launcher, ...] = (
    Launcher(
        name="spawn",
        marks=("HVDTRAIN_RANK",),
        needs=("HVDTRAIN_WORLD_SIZE", "HVDTRAIN_LOCAL_RANK", "HVDTRAIN_LOCAL_WORLD_SIZE", "HVDTRAIN_JOB_ID"),
        read=_spawn,
    ),
    Launcher(
        name="torchrun",
        marks=("TORCHELASTIC_RUN_ID",),
        needs=("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"),
        read=_torchrun,
    ),
    Launcher(
        name="mpirun",
        marks=("OMPI_COMM_WORLD_RANK",),
        needs=("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
        read=_open_mpi,
    ),
    Launcher(
        name="horovodrun",
        marks=("HOROVOD_RANK",),
        needs=("HOROVOD_SIZE", "HOROVOD_LOCAL_RANK", "HOROVOD_LOCAL_SIZE", "HOROVOD_CROSS_RANK", "HOROVOD_CROSS_SIZE"),
        read=_horovod_gloo,
    ),
    Launcher(
        name="mpirun (Hydra)",
        marks=("PMI_RANK",),
        needs=("PMI_SIZE",),
        read=_hydra,
        # srun sets PMI_RANK as well when its MPI plugin is PMI: then Slurm's own variables say more.
        applies=lambda env: not _is_srun_step(env) or "MPI_LOCALNRANKS" in env,
    ),
    Launcher(name="srun", marks=("SLURM_PROCID",), needs=("SLURM_LOCALID",), read=_slurm, applies=_is_srun_step),
    Launcher(name="environment", marks=("RANK",), needs=("WORLD_SIZE",), read=_plain),
)
