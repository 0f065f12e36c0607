"""The manifests against the schemas of Kubernetes, and what the operators of Kubeflow ask for."""

from __future__ import annotations

from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from hvdtrain.version import __version__

FOLDER = Path(__file__).resolve().parents[2] / "docker" / "kubernetes"
FILES = sorted(FOLDER.glob("*.yaml"))
# kubeflow.org/v2beta1 MPIJob and kubeflow.org/v1 PyTorchJob, as their definitions list them
SPEC = {
    "MPIJob": {
        "slotsPerWorker", "runLauncherAsWorker", "runPolicy", "mpiReplicaSpecs", "sshAuthMountPath",
        "launcherCreationPolicy", "mpiImplementation",
    },
    "PyTorchJob": {"elasticPolicy", "nprocPerNode", "pytorchReplicaSpecs", "runPolicy"},
}  # fmt: skip
POLICY = {"activeDeadlineSeconds", "backoffLimit", "cleanPodPolicy", "managedBy", "schedulingPolicy", "suspend",
          "ttlSecondsAfterFinished"}  # fmt: skip
REPLICA = {"replicas", "restartPolicy", "template"}


def documents():
    return [(file.name, one) for file in FILES for one in yaml.safe_load_all(file.read_text())]


def jobs():
    return [(name, one) for name, one in documents() if one["kind"] in SPEC]


def replicas(job):
    return job["spec"].get("mpiReplicaSpecs") or job["spec"]["pytorchReplicaSpecs"]


def test_there_is_a_job_for_each_engine():
    assert {name for name, _ in jobs()} == {"mpijob-horovod.yaml", "mpijob-mpi.yaml", "pytorchjob.yaml"}


@pytest.mark.parametrize(("name", "one"), [pair for pair in documents() if pair[1]["kind"] not in SPEC])
def test_plain_objects_fit_kubernetes_own_schema(name, one):
    kubernetes_validate.validate(one, "1.30", strict=True)


@pytest.mark.parametrize(("name", "job"), jobs())
def test_the_pods_of_a_job_fit_kubernetes_own_schema(name, job):
    for role, replica in replicas(job).items():
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": role.lower()}, **replica["template"]}
        kubernetes_validate.validate(pod, "1.30", strict=True)


@pytest.mark.parametrize(("name", "job"), jobs())
def test_a_job_has_only_fields_that_its_operator_knows(name, job):
    assert set(job["spec"]) <= SPEC[job["kind"]]
    assert set(job["spec"]["runPolicy"]) <= POLICY
    roles = {"Launcher", "Worker"} if job["kind"] == "MPIJob" else {"Master", "Worker"}
    assert set(replicas(job)) == roles
    for replica in replicas(job).values():
        assert set(replica) <= REPLICA


@pytest.mark.parametrize(("name", "job"), jobs())
def test_workers_have_shared_memory_checkpoints_resources_and_no_root(name, job):
    for role, replica in replicas(job).items():
        spec = replica["template"]["spec"]
        container = spec["containers"][0]
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert container["resources"]["requests"]
        assert container["image"].startswith(f"hvdtrain:{__version__}-")
        if role == "Launcher":
            continue
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
        assert "persistentVolumeClaim" in volumes[mounts["/checkpoints"]]


def test_mpi_jobs_start_as_many_ranks_as_there_are_slots():
    for _, job in jobs():
        if job["kind"] == "MPIJob":
            words = replicas(job)["Launcher"]["template"]["spec"]["containers"][0]["args"]
            slots = replicas(job)["Worker"]["replicas"] * job["spec"]["slotsPerWorker"]
            assert int(words[words.index("-np") + 1]) == slots
            assert job["spec"]["sshAuthMountPath"] == "/run/hvdtrain/ssh"
            assert replicas(job)["Worker"]["template"]["spec"]["containers"][0]["args"] == ["sshd"]


@pytest.mark.parametrize(("name", "job"), jobs())
def test_the_flags_are_flags_of_hvdtrain(name, job):
    from hvdtrain.cli import main

    for replica in replicas(job).values():
        words = replica["template"]["spec"]["containers"][0]["args"]
        if "hvdtrain" in words:
            assert main([*words[words.index("hvdtrain") + 1 :], "--print-config"]) in (0, None)
