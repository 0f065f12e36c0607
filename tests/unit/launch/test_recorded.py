"""Every launcher against what the real one gave to its processes; `record.py` says how these files were made."""

from __future__ import annotations

import json
from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from hvdtrain.launch.detect import Ancestor, Detection, detect

RECORDED = Path(__file__).with_name("recorded")

# Recording: launcher, and the world size of each job in it.
EXPECTED: dict[str, tuple[str, list[int]]] = {
    "openmpi4": ("mpirun", [3]),
    "openmpi4_two_nodes": ("mpirun", [3]),
    "openmpi4_by_node": ("mpirun", [4]),
    "openmpi4_own_node": ("mpirun", [4]),
    "openmpi5": ("mpirun", [3]),
    "openmpi5_two_nodes": ("mpirun", [4]),
    "openmpi5_by_node": ("mpirun", [4]),
    "openmpi5_uneven": ("mpirun", [3]),
    "mpich4": ("mpirun", [3]),
    "mpich4_two_nodes": ("mpirun", [3]),
    "mpich5": ("mpirun", [3]),
    "intel_mpi": ("mpirun", [3]),
    "intel_mpi_two_nodes": ("mpirun", [3]),
    "torchrun": ("torchrun", [2]),
    "torchrun_restart": ("torchrun", [2, 2]),
    "horovodrun_gloo": ("horovodrun", [3]),
    "horovodrun_gloo_two_nodes": ("horovodrun", [3]),
    "horovodrun_mpi": ("horovodrun", [2]),
    "srun_pmix": ("srun", [3]),
    "srun_pmi2": ("srun", [5]),
    "srun_cyclic": ("srun", [4]),
    "srun_het": ("srun", [3]),
    "srun_one_task": ("none", [1]),
    "srun_pty_shell": ("none", [1]),
    "srun_pty_script": ("srun", [2]),
    "sbatch": ("none", [1]),
    "sbatch_from_step": ("none", [1]),
    "salloc": ("none", [1]),
    "salloc_interactive_step": ("none", [1]),
    "sbatch_srun_part": ("srun", [2]),
    "sbatch_openmpi4": ("mpirun", [5]),
    "sbatch_openmpi5": ("mpirun", [4]),
    "sbatch_mpich4": ("mpirun", [4]),
    "sbatch_intel_mpi": ("mpirun", [4]),
    "srun_two_openmpi4": ("mpirun", [2, 2]),
    "srun_torchrun": ("torchrun", [4]),
    "openmpi4_torchrun": ("torchrun", [4]),
    "torchrun_two_openmpi5": ("mpirun", [2, 2]),
}
# Where the ranks are spread unevenly and the launcher does not say over how many nodes, only "more than one" is known.
NODES_NOT_STATED = {
    "openmpi5_uneven",
    "mpich4_two_nodes",
    "intel_mpi_two_nodes",
    "sbatch_openmpi5",
    "sbatch_mpich4",
    "sbatch_intel_mpi",
}
# What only the process tree tells: a job submitted from inside a step has the step's variables, an interactive shell in
# a step has the step's, and in a job inside a job neither is nearer by its variables alone.
TREE_DECIDES = {"sbatch_from_step", "srun_pty_shell", "torchrun_two_openmpi5"}


def processes(name: str) -> list[dict[str, Any]]:
    return [dict(each) for each in _content(name)["processes"]]


@cache
def _content(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((RECORDED / f"{name}.json").read_text())
    return content


def tree(process: dict[str, Any]) -> list[Ancestor]:
    return [Ancestor(arguments=tuple(a["arguments"]), environ=a["environ"]) for a in process["ancestors"]]


def detected(name: str) -> list[tuple[str, Detection]]:
    return [(each["host"], detect(each["environ"], ancestors=tree(each))) for each in processes(name)]


def jobs(name: str) -> dict[str, list[tuple[str, Detection]]]:
    found = defaultdict(list)
    for host, detection in detected(name):
        found[detection.job_id].append((host, detection))
    return dict(found)


def test_every_recording_is_expected_here() -> None:
    assert sorted(file.stem for file in RECORDED.glob("*.json")) == sorted(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_job_id_holds_together_exactly_the_ranks_of_one_job(name: str) -> None:
    launcher, sizes = EXPECTED[name]
    found = jobs(name)
    assert sorted(len(members) for members in found.values()) == sizes
    for members in found.values():
        topologies = [detection.topology for _, detection in members]
        assert {t.launcher for t in topologies} == {launcher}
        assert {t.world_size for t in topologies} == {len(members)}
        assert sorted(t.rank for t in topologies) == list(range(len(members)))


@pytest.mark.parametrize("name", EXPECTED)
def test_local_ranks_number_the_ranks_of_each_host(name: str) -> None:
    for members in jobs(name).values():
        hosts = defaultdict(list)
        for host, detection in members:
            agent = detection.topology.node_rank if detection.topology.launcher == "torchrun" else 0  # may share a host
            hosts[host, agent].append(detection.topology)
        for here in hosts.values():
            assert {t.local_world_size for t in here} == {len(here)}
            assert sorted(t.local_rank for t in here) == list(range(len(here)))
            assert len({t.node_rank for t in here}) == 1
        assert len({here[0].node_rank for here in hosts.values()}) == len(hosts)
        counted = {detection.topology.num_nodes for _, detection in members}
        if name in NODES_NOT_STATED:
            assert all(count > 1 for count in counted)
        else:
            assert counted == {len(hosts)}


@pytest.mark.parametrize("name", [name for name in EXPECTED if name not in TREE_DECIDES])
def test_the_variables_alone_tell_the_same_where_proc_cannot_be_read(name: str) -> None:
    for process in processes(name):
        blind, seeing = (detect(process["environ"], ancestors=a).topology for a in ((), tree(process)))
        for fact in ("launcher", "rank", "world_size", "local_rank", "local_world_size"):
            assert getattr(blind, fact) == getattr(seeing, fact)


@pytest.mark.parametrize("name", [name for name, (launcher, _) in EXPECTED.items() if launcher == "srun"])
def test_srun_names_the_host_of_rank_0(name: str) -> None:
    for members in jobs(name).values():
        host_of_0 = next(host for host, detection in members if detection.topology.rank == 0)
        assert {detection.first_host for _, detection in members} == {host_of_0}


@pytest.mark.parametrize("name", ["torchrun", "torchrun_restart", "srun_torchrun", "openmpi4_torchrun"])
def test_torchrun_names_an_address(name: str) -> None:
    for members in jobs(name).values():
        addresses = {detection.address for _, detection in members}
        assert len(addresses) == 1
        assert None not in addresses


@pytest.mark.parametrize(
    "name", ["torchrun_two_openmpi5", "srun_two_openmpi4", "openmpi4", "srun_pmix", "horovodrun_gloo"]
)
def test_no_address_where_none_is_this_jobs_own(name: str) -> None:
    assert {detection.address for _, detection in detected(name)} == {None}


def test_a_restart_is_another_job_at_the_same_address() -> None:
    first, second = sorted(jobs("torchrun_restart"))
    assert (first[-2:], second[-2:]) == ("-0", "-1")
    reasons = {detection.reason for _, detection in jobs("torchrun_restart")[second]}
    assert reasons == {"torchrun: RANK=0, restart 1", "torchrun: RANK=1, restart 1"}


def test_the_reason_names_the_variable_and_the_launcher_around_it() -> None:
    assert detected("openmpi5")[1][1].reason == "mpirun: OMPI_COMM_WORLD_RANK=1"
    assert detected("srun_torchrun")[3][1].reason == "torchrun: RANK=3 (started inside srun)"
    assert detected("torchrun_two_openmpi5")[0][1].reason == "mpirun: OMPI_COMM_WORLD_RANK=0 (started inside torchrun)"
    assert "not started by srun" in detected("sbatch")[0][1].reason


def test_the_title_of_slurms_process_tells_where_its_environment_is_hidden() -> None:
    for name in ("sbatch_from_step", "srun_pmi2", "srun_pmix"):
        assert all(process["ancestors"][-1]["environ"] is None for process in processes(name))


def test_recordings_hold_no_secret_and_no_private_name() -> None:
    for file in RECORDED.glob("*.json"):
        text = file.read_text()
        assert "SECRET" not in text
        for private in ("/root/",):
            assert private not in text, file.name
