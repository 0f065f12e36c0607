"""Which of several launchers counts, and whose address MASTER_ADDR and MASTER_PORT are (hand-written; see test_recorded)."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from hvdtrain.errors import LaunchError
from hvdtrain.launch.detect import Ancestor, detect

MASTER = {"MASTER_ADDR": "host1", "MASTER_PORT": "29500"}


def torchrun(rank: int, size: int, local: int = 2, **more: str) -> dict[str, str]:
    facts = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank % local, "LOCAL_WORLD_SIZE": local}
    facts |= {"GROUP_RANK": rank // local, "GROUP_WORLD_SIZE": size // local}
    return {k: str(v) for k, v in facts.items()} | MASTER | {"TORCHELASTIC_RUN_ID": "none"} | more


def open_mpi(rank: int, size: int, local: int | None = None, **more: str) -> dict[str, str]:
    local = local or size
    values = {"RANK": rank, "SIZE": size, "LOCAL_RANK": rank % local, "LOCAL_SIZE": local}
    return {f"OMPI_COMM_WORLD_{k}": str(v) for k, v in values.items()} | {"PMIX_NAMESPACE": "job@1"} | more


def slurm(rank: int, per_node: list[int], **more: str) -> dict[str, str]:
    node = next(n for n in range(len(per_node)) if rank < sum(per_node[: n + 1]))
    values = {
        "PROCID": rank,
        "LOCALID": rank - sum(per_node[:node]),
        "NODEID": node,
        "JOB_ID": 7,
        "STEP_ID": 0,
        "STEP_NUM_TASKS": sum(per_node),
        "STEP_TASKS_PER_NODE": ",".join(map(str, per_node)),
        "STEP_NODELIST": f"gpu[003-{2 + len(per_node):03d}]",
    }
    return {f"SLURM_{k}": str(v) for k, v in values.items()} | more


def hydra(rank: int, size: int, local: int) -> dict[str, str]:
    values = {"PMI_RANK": rank, "PMI_SIZE": size, "MPI_LOCALRANKID": rank % local, "MPI_LOCALNRANKS": local}
    return {k: str(v) for k, v in values.items()}


def spawned(rank: int, size: int) -> dict[str, str]:
    values = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size, "JOB_ID": "spawn-1"}
    return {f"HVDTRAIN_{k}": str(v) for k, v in values.items()}


def tree(*environments: dict[str, str] | str) -> list[Ancestor]:
    """A string is the name of a Slurm step: its process hides its environment."""
    return [
        Ancestor(arguments=(f"slurmstepd: [7.{each}]",)) if isinstance(each, str) else Ancestor(environ=each)
        for each in environments
    ]


def test_torchrun_started_by_mpirun_once_a_node() -> None:
    outer = open_mpi(1, 2, 1)
    found = detect(outer | torchrun(3, 4), ancestors=tree(outer, {}))
    assert (found.topology.launcher, found.topology.rank, found.address) == ("torchrun", 3, "host1:29500")


def test_mpirun_called_by_a_script_under_torchrun_does_not_meet_at_torchruns_address() -> None:
    outer = torchrun(1, 2)
    found = detect(outer | open_mpi(1, 3), ancestors=tree(outer, outer, {}))
    assert (found.topology.launcher, found.topology.rank, found.topology.world_size) == ("mpirun", 1, 3)
    assert found.address is None


def test_a_shell_between_launcher_and_process_changes_nothing() -> None:
    outer = slurm(1, [1, 1])
    inner = outer | torchrun(2, 4)
    assert detect(inner, ancestors=tree(inner, inner, outer, "0")).topology.launcher == "torchrun"


def test_torchrun_inside_mpirun_inside_torchrun() -> None:
    first = torchrun(0, 2)
    second = first | open_mpi(0, 2)
    third = second | torchrun(1, 2, MASTER_PORT="29600")
    found = detect(third, ancestors=tree(second, first, {}))
    assert (found.topology.launcher, found.topology.rank, found.address) == ("torchrun", 1, "host1:29600")


def test_srun_called_where_torchrun_is_around_is_the_nearer() -> None:
    outer = torchrun(0, 2)
    found = detect(outer | slurm(1, [2]), ancestors=tree("0"))
    assert (found.topology.launcher, found.address) == ("srun", None)


def test_spawn_is_the_nearest_and_has_no_address_of_others() -> None:
    outer = torchrun(0, 2)
    for ancestors in (tree(outer, {}), []):
        found = detect(outer | spawned(2, 3), ancestors=ancestors)
        assert (found.topology.launcher, found.topology.rank, found.address) == ("spawn", 2, None)
        assert found.job_id == "spawn-1"


def test_spawned_ranks_meet_by_themselves_also_where_an_address_is_exported() -> None:
    assert detect(spawned(1, 2) | MASTER).address is None


def test_mpirun_called_by_a_spawned_rank_is_nearer_than_spawn() -> None:
    outer = spawned(1, 2)
    assert detect(outer | open_mpi(0, 2), ancestors=tree(outer, {})).topology.launcher == "mpirun"


def test_hydra_inside_an_allocation_starts_its_daemons_by_srun_and_is_still_the_launcher() -> None:
    daemon = slurm(1, [1, 1])
    env = daemon | hydra(3, 4, 2)
    for ancestors in (tree(daemon, "0"), []):
        assert detect(env, ancestors=ancestors).topology.rank == 3
        assert detect(env, ancestors=ancestors).topology.launcher == "mpirun"


def test_a_hidden_process_in_between_is_passed_over() -> None:
    outer = torchrun(1, 2)
    ancestors = [Ancestor(arguments=("sudo",)), *tree(outer, {})]
    assert detect(outer | open_mpi(0, 2), ancestors=ancestors).topology.launcher == "mpirun"


def test_rank_and_world_size_set_from_slurms_by_a_script_give_srun_its_address() -> None:
    inner = slurm(2, [2, 1]) | {"RANK": "2", "WORLD_SIZE": "3"} | MASTER
    for ancestors in (tree(slurm(2, [2, 1]), "0"), tree("0"), []):
        found = detect(inner, ancestors=ancestors)
        assert (found.topology.launcher, found.topology.local_world_size) == ("srun", 1)
        assert found.address == "host1:29500"


def test_master_variables_exported_for_srun_or_mpirun_are_their_address() -> None:
    assert detect(slurm(1, [2]) | MASTER, ancestors=tree("0")).address == "host1:29500"
    assert detect(open_mpi(1, 2) | MASTER, ancestors=tree(MASTER)).address == "host1:29500"
    assert detect(open_mpi(1, 2) | {"MASTER_ADDR": "host1"}).address is None


def test_a_script_that_starts_its_own_ranks_in_an_srun_task_is_the_nearer() -> None:
    outer = slurm(1, [1, 1])
    plain = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"} | MASTER
    found = detect(outer | plain, ancestors=tree(outer, "0"))
    assert (found.topology.launcher, found.topology.rank, found.topology.node_rank) == ("environment", 3, 1)


def test_mpirun_in_a_pod_counts_and_the_pods_address_is_not_its_own() -> None:
    pod = {"RANK": "0", "WORLD_SIZE": "2", "KUBERNETES_SERVICE_HOST": "192.0.2.1"} | MASTER
    for rank in (0, 1):  # rank 0 has the pod's numbers by chance: all ranks must decide alike
        found = detect(pod | open_mpi(rank, 2), ancestors=tree(pod, pod))
        assert (found.topology.launcher, found.topology.rank, found.address) == ("mpirun", rank, None)


def test_torchrun_in_a_pod_is_torchrun() -> None:
    pod = {"RANK": "1", "WORLD_SIZE": "2", "KUBERNETES_SERVICE_HOST": "192.0.2.1", "PET_NNODES": "2"} | MASTER
    assert detect(pod | torchrun(3, 4), ancestors=tree(pod)).topology.launcher == "torchrun"


def test_a_batch_script_with_variables_of_the_step_that_submitted_it_is_one_process() -> None:
    stale = slurm(0, [2, 2])
    assert detect(stale, ancestors=tree(stale, "batch")).topology.world_size == 1
    assert detect(stale, ancestors=tree("0")).topology.world_size == 4


@pytest.mark.parametrize(
    ("tree_of", "size"), [(("-bash",), 1), (("bash", "-l"), 1), (("bash", "run.sh"), 2), (("python", "-m", "x"), 2)]
)
def test_only_a_shell_that_somebody_types_in_is_no_rank_of_srun_pty(tree_of: tuple[str, ...], size: int) -> None:
    env = slurm(0, [2], SLURM_PTY_PORT="4711")
    ancestors = [Ancestor(arguments=tree_of, environ=env), *tree("0")]
    assert detect(env, ancestors=ancestors).topology.world_size == size


def test_half_set_variables_of_one_launcher_do_not_spoil_another() -> None:
    assert detect(open_mpi(1, 2) | {"RANK": "1"}).topology.launcher == "mpirun"
    assert detect(slurm(1, [2]) | {"HOROVOD_SIZE": "2"}).topology.launcher == "srun"
    assert detect(torchrun(1, 2) | {"PMI_RANK": "0"}).topology.launcher == "torchrun"


# Many nodes, by hand.
@pytest.mark.parametrize("rank", range(6))
def test_srun_over_uneven_nodes(rank: int) -> None:
    found = detect(slurm(rank, [3, 1, 2]))
    topology = found.topology
    assert (topology.node_rank, topology.local_rank) == [(0, 0), (0, 1), (0, 2), (1, 0), (2, 0), (2, 1)][rank]
    assert (topology.local_world_size, topology.num_nodes) == ([3, 1, 2][topology.node_rank], 3)
    assert (found.first_host, found.job_id) == ("gpu003", "srun-7.0.0")


def test_steps_jobs_and_requeued_attempts_are_different_jobs() -> None:
    changes: list[dict[str, str]] = [{}, {"SLURM_STEP_ID": "1"}, {"SLURM_JOB_ID": "8"}, {"SLURM_RESTART_COUNT": "1"}]
    assert len({detect(slurm(1, [2]) | each).job_id for each in changes}) == 4


def test_horovodrun_with_uneven_nodes_knows_that_there_is_more_than_one() -> None:
    names = ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE")
    facts = [(0, 3, 0, 2, 0, 2), (1, 3, 1, 2, 0, 1), (2, 3, 0, 1, 1, 2)]  # as horovodrun -H a:2,b:1 gives them
    found = [detect({f"HOROVOD_{n}": str(v) for n, v in zip(names, each, strict=True)}).topology for each in facts]
    assert [(t.node_rank, t.num_nodes) for t in found] == [(0, 2), (0, 2), (1, 2)]


def test_hydra_spread_evenly_fills_node_by_node() -> None:
    found = [detect(hydra(rank, 6, 2)).topology for rank in range(6)]
    assert [(t.node_rank, t.num_nodes, t.local_rank) for t in found] == [(r // 2, 3, r % 2) for r in range(6)]


def test_pmi_without_local_numbers_is_one_rank_a_node_and_says_so() -> None:
    found = detect({"PMI_RANK": "1", "PMI_SIZE": "2"})
    assert (found.topology.local_world_size, found.topology.num_nodes) == (1, 2)
    assert "one rank a node is assumed" in found.reason
    cray = detect({"PMI_RANK": "5", "PMI_SIZE": "8", "PMI_LOCAL_RANK": "1", "PMI_LOCAL_SIZE": "4"})
    assert (cray.topology.local_rank, cray.topology.node_rank, cray.topology.num_nodes) == (1, 1, 2)


def test_two_mpiruns_of_open_mpi_4_are_apart_even_where_the_short_hash_of_their_names_is_the_same() -> None:
    key = "OMPI_MCA_orte_precondition_transports"
    assert detect(open_mpi(0, 2) | {key: "a-b"}).job_id != detect(open_mpi(0, 2) | {key: "a-c"}).job_id


def test_the_number_of_a_node_falls_back_on_the_rank_where_open_mpi_started_daemons_that_got_no_rank() -> None:
    # Seen with -H host1:2,host2:2,host3:2 -np 3: mpirun is daemon 0, host2's is 2 of 4, and two nodes hold ranks.
    names = ("orte_num_nodes", "ess_base_num_procs", "orte_local_daemon_uri")
    facts = {f"OMPI_MCA_{n}": v for n, v in zip(names, ("2", "4", "77.2;tcp://192.0.2.1:1"), strict=True)}
    topology = detect(open_mpi(2, 3, 1) | facts | {"OMPI_COMM_WORLD_LOCAL_RANK": "0"}).topology
    assert (topology.node_rank, topology.num_nodes) == (1, 2)


def test_a_stated_number_of_nodes_that_cannot_be_is_refused() -> None:
    with pytest.raises(LaunchError, match="num_nodes=1 does not fit local_world_size=1 of world_size=2"):
        detect(open_mpi(0, 2, 1) | {"OMPI_MCA_orte_num_nodes": "1"})


HOROVODRUN_MPI = {
    "OMPI_MCA_pml": "ob1",
    "OMPI_MCA_btl": "^openib",
    "OMPI_MCA_orte_tag_output": "1",
    "OMPI_MCA_hwloc_base_binding_policy": "none",
    "OMPI_MCA_rmaps_base_mapping_policy": "slot",
}


def test_horovodrun_mpi_is_known_by_all_that_it_hands_to_mpirun_and_by_nothing_less() -> None:
    assert detect(open_mpi(1, 2) | HOROVODRUN_MPI).topology.launcher == "horovodrun"
    for left_out in HOROVODRUN_MPI:
        less = {name: value for name, value in HOROVODRUN_MPI.items() if name != left_out}
        assert detect(open_mpi(1, 2) | less).topology.launcher == "mpirun"


def test_a_horovod_variable_in_somebodys_shell_does_not_make_mpirun_horovodrun() -> None:
    assert detect(open_mpi(1, 2, HOROVOD_CYCLE_TIME="1")).topology.launcher == "mpirun"


def test_job_ids_are_file_names() -> None:
    odd = ["../../etc/passwd", "a b/c", ".hidden", "x" * 300, "ü", "job:1"]
    found = {detect(torchrun(0, 2, TORCHELASTIC_RUN_ID=each)).job_id for each in odd}
    found |= {detect(spawned(0, 2) | {"HVDTRAIN_JOB_ID": each}).job_id for each in odd}
    assert len(found) == 2 * len(odd)
    for each in found:
        assert re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}", each)


# Plain variables.
PLAIN = {"RANK": "5", "WORLD_SIZE": "6"} | MASTER


@pytest.mark.parametrize(
    ("more", "local_rank", "local_size", "node", "nodes", "said"),
    [
        ({}, 0, 1, 5, 6, "one rank a node is assumed"),
        ({"LOCAL_WORLD_SIZE": "1"}, 0, 1, 5, 6, ""),
        ({"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, 1, 2, 2, 3, ""),
        ({"LOCAL_RANK": "1", "LOCAL_SIZE": "2"}, 1, 2, 2, 3, ""),
        ({"LOCAL_RANK": "5"}, 5, 6, 0, 1, "one node is assumed"),
    ],
)
def test_plain_variables_with_and_without_local_ones(
    more: dict[str, str], local_rank: int, local_size: int, node: int, nodes: int, said: str
) -> None:
    found = detect(PLAIN | more)
    topology = found.topology
    assert (topology.rank, topology.world_size, found.address) == (5, 6, "host1:29500")
    assert (topology.local_rank, topology.local_world_size, topology.node_rank, topology.num_nodes) == (
        local_rank,
        local_size,
        node,
        nodes,
    )
    assert found.reason.startswith("environment: RANK=5")
    assert ("assumed" in found.reason) == bool(said)
    assert said in found.reason


def test_plain_variables_on_one_node_need_no_address() -> None:
    env = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    assert detect(env).address is None
    assert detect(env).job_id == detect(env | {"RANK": "0", "LOCAL_RANK": "0"}).job_id
    assert detect(env | {"HVDTRAIN_JOB_ID": "mine"}).job_id == "environment-mine"


@pytest.mark.parametrize("env", [{"RANK": "0", "WORLD_SIZE": "1"}, {"WORLD_SIZE": "1"}, {"RANK": "", "WORLD_SIZE": ""}])
def test_plain_variables_of_one_process_need_nothing_else(env: dict[str, str]) -> None:
    assert detect(env).topology.world_size == 1


@pytest.mark.parametrize(
    "env",
    [
        MASTER,
        {"LOCAL_RANK": "0"},
        {"HVDTRAIN_RENDEZVOUS_DIR": "x"},
        {"HOROVOD_CYCLE_TIME": "1"},
        {"PMIX_RANK": "0"},
        {"PMI_FD": "3"},
        {"OMPI_MCA_btl": "self"},
        {"PET_NNODES": "2"},
        {"TORCHELASTIC_MAX_RESTARTS": "0"},
        {"HVDTRAIN_JOB_ID": "x"},
        {"SLURM_JOB_ID": "3", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"},
    ],
)
def test_stray_variables_do_not_disturb_plain_python(env: dict[str, str]) -> None:
    found = detect(env)
    assert (found.topology.world_size, found.topology.launcher, found.address) == (1, "none", None)


@pytest.mark.parametrize(
    ("env", "parts"),
    [
        ({"RANK": "0"}, ["Found: RANK=0", "Missing: WORLD_SIZE", "unset RANK to run one process"]),
        ({"WORLD_SIZE": "4"}, ["Found: WORLD_SIZE=4", "Missing: RANK"]),
        ({"RANK": "1", "WORLD_SIZE": "2"}, ["MASTER_ADDR and MASTER_PORT", "Found: RANK=1, WORLD_SIZE=2"]),
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a"}, ["MASTER_PORT must name", "MASTER_ADDR=a"]),
        (PLAIN | {"LOCAL_RANK": "1"}, ["LOCAL_WORLD_SIZE is missing"]),
        (PLAIN | {"LOCAL_WORLD_SIZE": "2"}, ["LOCAL_RANK is missing"]),
        (PLAIN | {"RANK": "6"}, ["rank=6 does not fit world_size=6"]),
        (PLAIN | {"RANK": "-1"}, ["rank=-1 does not fit"]),
        (PLAIN | {"RANK": "1_0"}, ["RANK='1_0' is not a whole number"]),
        (PLAIN | {"MASTER_PORT": "0"}, ["MASTER_PORT=0 is not a port"]),
        (PLAIN | {"MASTER_PORT": "http"}, ["MASTER_PORT='http' is not a whole number"]),
        (PLAIN | {"PET_NPROC_PER_NODE": "8"}, ["PET_NPROC_PER_NODE=8", "torchrun -m hvdtrain"]),
        (
            {"TORCHELASTIC_RUN_ID": "x", "RANK": "0"},
            ["torchrun", "Missing: WORLD_SIZE, LOCAL_RANK", "Start through torchrun"],
        ),
        (
            torchrun(0, 2, LOCAL_WORLD_SIZE="3"),
            ["local_world_size=3 is larger than world_size=2", "LOCAL_WORLD_SIZE=3"],
        ),
        (torchrun(0, 2, MASTER_PORT="65536"), ["MASTER_PORT=65536 is not a port"]),
        (open_mpi(2, 2), ["^mpirun: rank=2 does not fit world_size=2", "Found: OMPI_COMM_WORLD_RANK=2"]),
        (open_mpi(0, 2, OMPI_COMM_WORLD_LOCAL_SIZE="0"), ["local_world_size=0"]),
        (open_mpi(0, 2, OMPI_COMM_WORLD_LOCAL_SIZE="3"), ["local_world_size=3 is larger"]),
        ({"PMI_SIZE": "2"}, ["Found: PMI_SIZE=2", "Missing: PMI_RANK"]),
        ({"HOROVOD_RANK": "0", "HOROVOD_SIZE": "2"}, ["horovodrun", "Missing: HOROVOD_LOCAL_RANK"]),
        ({"HVDTRAIN_RANK": "0"}, ["spawn", "Missing: HVDTRAIN_WORLD_SIZE", "HVDTRAIN_JOB_ID"]),
        (slurm(1, [2], SLURM_STEP_TASKS_PER_NODE="3"), ["SLURM_STEP_TASKS_PER_NODE=3 fits neither"]),
        (slurm(1, [2], SLURM_NODEID="1"), ["SLURM_NODEID=1"]),
        (slurm(1, [2], SLURM_STEP_NODELIST="gpu["), ["node list 'gpu\\['"]),
        ({k: v for k, v in slurm(1, [2]).items() if k != "SLURM_LOCALID"}, ["srun", "Missing: SLURM_LOCALID"]),
    ],
)
def test_half_set_and_contradictory_variables_are_refused_with_found_missing_and_remedy(
    env: dict[str, str], parts: list[str]
) -> None:
    with pytest.raises(LaunchError) as caught:
        detect(env)
    message = str(caught.value)
    for part in [*parts, "Found: ", "to run one process"]:
        assert re.search(part, message), message


def test_importing_detection_loads_no_torch() -> None:
    code = "import sys, hvdtrain.launch.detect; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], timeout=30, check=True)
