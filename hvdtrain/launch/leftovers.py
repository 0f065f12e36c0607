"""What speaks of several processes where only one was found: a launcher's variables that came through in part.

A container, ``sudo`` or ``ssh`` that passes on some variables and not others leaves a rank without a size, or a size
without a rank. Each such process would train as a world of its own, so that this is refused. What an ordinary shell in
an allocation holds is no sign of ranks: ``SLURM_NTASKS``, and ranks that are 0.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from hvdtrain.launch.ancestry import Ancestor
from hvdtrain.launch.launchers import LAUNCHERS, Environment, slurm_step_number, was_left_by_srun

_PYTORCH = ("torchrun", "environment")
_PMIX = ("mpirun", "srun")
# A rank that is not 0, or a size that is not 1, and the launchers whose complete variables account for it.
_RANKS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("HVDTRAIN_RANK", "HVDTRAIN_LOCAL_RANK"), ("spawn",)),
    **dict.fromkeys(("RANK", "LOCAL_RANK"), _PYTORCH),
    **dict.fromkeys(("GROUP_RANK", "ROLE_RANK"), ("torchrun",)),
    **dict.fromkeys([f"OMPI_COMM_WORLD_{part}" for part in ("RANK", "LOCAL_RANK", "NODE_RANK")], ("mpirun",)),
    **dict.fromkeys([f"HOROVOD_{part}" for part in ("RANK", "LOCAL_RANK", "CROSS_RANK")], ("horovodrun",)),
    **dict.fromkeys(("PMI_RANK", "PMI_LOCAL_RANK", "MPI_LOCALRANKID"), ("mpirun (Hydra)", "srun")),
    "PMIX_RANK": _PMIX,
    **dict.fromkeys(("SLURM_PROCID", "SLURM_LOCALID"), ("srun",)),
}
_SIZES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("HVDTRAIN_WORLD_SIZE", "HVDTRAIN_LOCAL_WORLD_SIZE"), ("spawn",)),
    **dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), _PYTORCH),
    **dict.fromkeys(("GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE"), ("torchrun",)),
    **dict.fromkeys([f"OMPI_COMM_WORLD_{part}" for part in ("SIZE", "LOCAL_SIZE")], ("mpirun",)),
    **dict.fromkeys([f"HOROVOD_{part}" for part in ("SIZE", "LOCAL_SIZE", "CROSS_SIZE")], ("horovodrun",)),
    **dict.fromkeys(("PMI_SIZE", "PMI_LOCAL_SIZE", "MPI_LOCALNRANKS"), ("mpirun (Hydra)", "srun")),
    **dict.fromkeys(("SLURM_STEP_NUM_TASKS", "SLURM_STEP_NUM_NODES"), ("srun",)),
}


def leftovers(env: Environment, ancestors: Sequence[Ancestor], complete: Collection[str]) -> list[str]:
    """The variables that speak of several processes and that no launcher accounts for.

    Args:
        env: The environment.
        ancestors: Parent, grandparent, ..., as far as they can be seen.
        complete: The names of the launchers whose variables are all there and were weighed.
    """
    found = [name for name, owners in _RANKS.items() if _more_than(env, name, 0) and not set(owners) & set(complete)]
    found += [name for name, owners in _SIZES.items() if _more_than(env, name, 1) and not set(owners) & set(complete)]
    if "srun" in complete:
        return found
    if env.get("SLURM_STEP_TASKS_PER_NODE", "1") != "1":
        found.append("SLURM_STEP_TASKS_PER_NODE")
    if was_left_by_srun(env, ancestors):
        return [name for name in found if not _is_sruns(env, name)]
    if not _is_one_task(env):
        found += _step_without_count(env)
        return found
    # An interactive shell, a batch script or a single task: its counts are not those of ranks, but it is rank 0.
    return [name for name in found if not name.startswith("SLURM_STEP_")]


def speaks_of_several(env: Environment) -> bool:
    """Whether `leftovers` could find any: a look at the environment alone."""
    return bool(leftovers(env, (), ()))


def without_launchers(env: Environment) -> dict[str, str]:
    """The environment without what launchers say of one process: what a launcher that is started in it should inherit."""
    names = {*_RANKS, *_SIZES, *(name for launcher in LAUNCHERS for name in (*launcher.needs, *launcher.marks))}
    return {name: value for name, value in env.items() if name not in names and not name.startswith("PMIX_")}


def _more_than(env: Environment, name: str, value: int) -> bool:
    text = env.get(name, "").strip()
    return text.isascii() and text.isdigit() and (len(text.lstrip("0")) > 9 or int(text) > value)


def _is_sruns(env: Environment, name: str) -> bool:
    return name.startswith(("SLURM_", "PMI_", "PMIX_"))


def _is_one_task(env: Environment) -> bool:
    step = slurm_step_number(env)
    return env.get("SLURM_STEP_NUM_TASKS") == "1" or (step is not None and step >= 0xFFFF0000)


def _step_without_count(env: Environment) -> list[str]:
    """The step of a task that is not told how many tasks there are (srun sets SLURM_NTASKS to their number, too)."""
    if "SLURM_STEP_ID" not in env or "SLURM_STEP_NUM_TASKS" in env or env.get("SLURM_NTASKS") == "1":
        return []
    return ["SLURM_STEP_ID"]
