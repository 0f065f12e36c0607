"""A run that was written by any engine on any number of ranks goes on by any other: same batches, same result."""

from __future__ import annotations

import json

import pytest
from launching import HOROVOD_GLOO, HOROVOD_MPIRUN, LOCAL, MPI, ROOT, TORCH, Launch, run
from resume_job import STOP, resumed, trained, write

from hvdtrain.backends.local import LocalBackend
from hvdtrain.launch.detect import Detection
from hvdtrain.topology import Topology

JOB = str(ROOT / "tests" / "system" / "resume_job.py")
World = tuple[Launch, int]
WORLDS = [(LOCAL, 1), *[(launch, ranks) for launch in (TORCH, MPI, HOROVOD_GLOO) for ranks in (1, 2, 3, 4)]]


def named(world: World) -> str:
    return f"{world[0].backend}-{world[1]}"


@pytest.fixture(scope="module")
def alone():
    with LocalBackend(Detection(topology=Topology.single(), reason="test", job_id="test"), device="cpu") as backend:
        yield backend


@pytest.fixture(scope="module")
def uninterrupted(alone):
    return trained(alone)


def job(world: World, folder, *words: str) -> dict:
    launch, ranks = world
    out = folder / f"{named(world)}.json"
    ended = run(launch.argv(ranks, JOB, launch.backend, str(out), *words), timeout_s=400)
    assert ended.code == 0, ended.output
    return json.loads(out.read_text())


def check(found: dict, uninterrupted: dict) -> None:
    assert found["steps"] == uninterrupted["steps"] == 15
    assert found["batches"] == uninterrupted["batches"][STOP:]
    assert found["losses"] == pytest.approx(uninterrupted["losses"][STOP:], abs=1e-9, rel=0)
    for name in ("train_loss", "eval_loss", "parameters"):
        assert found[name] == pytest.approx(uninterrupted[name], abs=1e-9, rel=0)


def test_a_run_that_moves_from_engine_to_engine_ends_as_if_it_had_not(tmp_path, alone, uninterrupted):
    # local-1 to torch-3, torch-3 to horovod-2 (under mpirun, which starts sooner), and that to local-1.
    chain = [tmp_path / name for name in ("local", "torch", "horovod")]
    write(alone, chain[0])
    for world, own, before in (((TORCH, 3), chain[1], chain[0]), ((HOROVOD_MPIRUN, 2), chain[2], chain[1])):
        check(job(world, tmp_path, "--write", str(own), str(before))[str(before)], uninterrupted)
    check(resumed(alone, chain[2]), uninterrupted)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """By each world the folder of its checkpoints."""
    folder = tmp_path_factory.mktemp("written")
    for world in WORLDS:
        job(world, folder, "--write", str(folder / named(world)))
    return folder


@pytest.mark.slow
@pytest.mark.timeout(3600)  # the first one writes for all: thirteen launches
@pytest.mark.parametrize("target", WORLDS, ids=named)
def test_every_world_goes_on_from_every_other(written, tmp_path, uninterrupted, target):
    found = job(target, tmp_path, *[str(written / named(source)) for source in WORLDS])
    for source in WORLDS:
        check(found[str(written / named(source))], uninterrupted)
