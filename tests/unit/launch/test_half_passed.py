"""Environments of which a part came through: never a world of one in silence, and ordinary shells stay usable."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvdtrain.errors import LaunchError
from hvdtrain.launch.ancestry import Ancestor
from hvdtrain.launch.detect import detect
from hvdtrain.launch.launchers import spawned

MASTER = {"MASTER_ADDR": "host1", "MASTER_PORT": "29500"}
TORCHRUN = MASTER | {
    "RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "1", "GROUP_WORLD_SIZE": "2",
    "ROLE_RANK": "2", "ROLE_WORLD_SIZE": "4", "TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "0",
}  # fmt: skip
SRUN = {
    "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_PROCID": "2", "SLURM_LOCALID": "0", "SLURM_NODEID": "1",
    "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_STEP_NODELIST": "gpu[3-4]",
}  # fmt: skip
SRUN_PMI = SRUN | {"PMI_RANK": "2", "PMI_SIZE": "4", "PMI_FD": "9"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "OMPI_COMM_WORLD_NODE_RANK": "0", "PMIX_RANK": "2", "PMIX_NAMESPACE": "job@1",
}  # fmt: skip
HYDRA = {"PMI_RANK": "2", "PMI_SIZE": "4", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2", "PMI_FD": "6"}
HOROVOD = {
    f"HOROVOD_{n}": v
    for n, v in (("RANK", "2"), ("SIZE", "4"), ("LOCAL_RANK", "0"), ("LOCAL_SIZE", "2"), ("CROSS_RANK", "1"), ("CROSS_SIZE", "2"))
}  # fmt: skip
LAUNCHERS = {
    "torchrun": TORCHRUN, "srun": SRUN, "srun with PMI": SRUN_PMI, "mpirun": OPEN_MPI, "Hydra": HYDRA, "horovodrun": HOROVOD,
    "spawn": spawned(2, 4, "abc"),
}  # fmt: skip
# What tells nothing of ranks: any part that holds only these may train alone.
SILENT = {
    "SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_NODEID", "SLURM_STEP_NODELIST", "SLURM_LOCALID", "PMI_FD",
    "PMIX_NAMESPACE", "OMPI_COMM_WORLD_NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT", "HVDTRAIN_JOB_ID",
    "LOCAL_RANK", "MPI_LOCALRANKID",
}  # fmt: skip


def alone_or_not(env: dict[str, str], ancestors: Any = ()) -> str:
    """What `detect` makes of it: "alone", "several" or "refused"; a refusal names variables and the remedy."""
    try:
        found = detect(env, ancestors=ancestors)
    except LaunchError as error:
        message = str(error)
    else:
        return "alone" if found.topology.world_size == 1 else "several"
    assert any(f"{name}=" in message for name in env), message
    assert "to run one process" in message
    return "refused"


@pytest.mark.parametrize("name", LAUNCHERS)
@pytest.mark.parametrize("rank", ["0", "2"])
def test_whatever_one_or_two_variables_are_missing_it_is_never_a_world_of_one(name: str, rank: str) -> None:
    numbers = ("RANK", "PROCID", "NODEID")
    whole = {k: "0" if rank == "0" and k.endswith(numbers) else v for k, v in LAUNCHERS[name].items()}
    for missing in [(), *((each,) for each in whole), *itertools.combinations(whole, 2)]:
        env = {key: value for key, value in whole.items() if key not in missing}
        assert alone_or_not(env) != "alone", missing


@pytest.mark.parametrize("name", LAUNCHERS)
def test_whatever_single_variables_came_through_it_is_never_a_world_of_one(name: str) -> None:
    for kept in LAUNCHERS[name].keys() - SILENT:
        assert alone_or_not({kept: LAUNCHERS[name][kept]}) == "refused", kept


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_part_of_any_launchers_variables_beside_any_others_is_never_a_world_of_one(data: st.DataObject) -> None:
    env: dict[str, str] = {}
    for whole in data.draw(st.lists(st.sampled_from([*LAUNCHERS.values()]), min_size=1, max_size=3)):
        env |= {key: whole[key] for key in data.draw(st.sets(st.sampled_from(sorted(whole))))}
    if env.keys() - SILENT:
        assert alone_or_not(env) != "alone"
    else:
        assert alone_or_not(env) == "alone"


@settings(max_examples=150, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(sorted({key for whole in LAUNCHERS.values() for key in whole} | {"PET_NPROC_PER_NODE"})),
        st.one_of(
            st.sampled_from(
                ["", "0", "1", "2", "4", "-1", "²", "٣", "1_0", "0x1", "9" * 30, "\udcff", "1 ", "1(x2)", "a[1-"]
            ),
            st.text(max_size=8),
        ),
    )
)
def test_any_values_are_a_topology_or_a_refusal_that_can_be_printed(env: dict[str, str]) -> None:
    try:
        found = detect(env)
    except LaunchError as error:
        str(error).encode()
        return
    found.job_id.encode("ascii")
    found.reason.encode()


@pytest.mark.parametrize(
    ("env", "named"),
    [
        ({"SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "4"}, ["SLURM_PROCID=2", "SLURM_STEP_NUM_TASKS=4"]),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_ID": "²"}, ["SLURM_STEP_NUM_TASKS=4"]),
        ({"SLURM_PROCID": "2", "SLURM_NTASKS": "4"}, ["SLURM_PROCID=2"]),
        ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, ["SLURM_STEP_ID=0"]),
        ({"SLURM_STEP_ID": "4294967290", "SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "1"}, ["SLURM_PROCID=2"]),
        ({"PMI_RANK": "1", "PMI_SIZE": "2", "SLURM_STEP_ID": "0"}, ["PMI_RANK=1", "PMI_SIZE=2"]),
        ({"PMI_RANK": "0", "PMI_SIZE": "2", "SLURM_STEP_ID": "0"}, ["PMI_SIZE=2"]),
        ({"PMIX_RANK": "1"}, ["PMIX_RANK=1"]),
        ({"LOCAL_RANK": "1"}, ["LOCAL_RANK=1"]),
        ({"RANK": "0", "WORLD_SIZE": "1", "SLURM_PROCID": "2"}, ["SLURM_PROCID=2"]),
        ({"RANK": "0", "WORLD_SIZE": "1", "GROUP_WORLD_SIZE": "2"}, ["GROUP_WORLD_SIZE=2"]),
        ({"WORLD_SIZE": "1", "MPI_LOCALNRANKS": "3"}, ["MPI_LOCALNRANKS=3"]),
    ],
)
def test_the_variables_that_speak_of_several_are_named(env: dict[str, str], named: list[str]) -> None:
    with pytest.raises(LaunchError) as caught:
        detect(env)
    for each in named:
        assert each in str(caught.value)


INTERACTIVE = {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
BATCH = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
TYPED_SHELL = (Ancestor(arguments=("-bash",)), Ancestor(arguments=("slurmstepd: [7.0]",)))


@pytest.mark.parametrize(
    ("env", "ancestors"),
    [
        (BATCH, ()),
        (BATCH | INTERACTIVE, ()),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_JOB_NUM_NODES": "2"}, ()),  # salloc
        (SRUN_PMI | {"SLURM_PROCID": "0"}, (Ancestor(arguments=("slurmstepd: [7.batch]",)),)),  # sbatch from a step
        (SRUN_PMI | {"SLURM_PROCID": "0", "PMI_RANK": "0", "SLURM_PTY_PORT": "9"}, TYPED_SHELL),
        (BATCH | {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1", "PMIX_RANK": "0"}, ()),  # srun -n1
        ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, ()),
        ({"PMI_RANK": "0", "PMI_SIZE": "1"}, ()),
        ({"PMI_FD": "3", "PMIX_RANK": "0"}, ()),
        ({"LOCAL_RANK": "-1"}, ()),
        ({"OMPI_UNIVERSE_SIZE": "8"}, ()),
        (spawned(0, 1, "x") | {"SLURM_PROCID": "2"}, ()),  # spawn(fn, 1) says itself what it starts
        # mpirun -np 1, typed where a part of a step's variables is in sight
        (
            {f"OMPI_COMM_WORLD_{n}": v for n, v in (("RANK", "0"), ("SIZE", "1"), ("LOCAL_RANK", "0"), ("LOCAL_SIZE", "1"))}
            | {"SLURM_PROCID": "2"},
            (Ancestor(environ={"SLURM_PROCID": "2"}),),
        ),
    ],
)  # fmt: skip
def test_ordinary_shells_stay_usable(env: dict[str, str], ancestors: tuple[Ancestor, ...]) -> None:
    assert detect(env, ancestors=ancestors).topology.world_size == 1


def test_one_rank_jobs_inside_another_launchers_rank_are_one_rank() -> None:
    inner = TORCHRUN | {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_WORLD_SIZE": "1",
        "GROUP_RANK": "0",
        "GROUP_WORLD_SIZE": "1",
    }
    inner |= {"ROLE_RANK": "0", "ROLE_WORLD_SIZE": "1"}
    for outer in (SRUN, OPEN_MPI, HYDRA):
        assert detect(outer | inner, ancestors=(Ancestor(environ=outer),)).topology.world_size == 1
