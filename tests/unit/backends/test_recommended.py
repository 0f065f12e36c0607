"""``--backend auto:RUN``: followed where it holds, refused with what differs where it does not."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import hvdtrain
from hvdtrain import backends
from hvdtrain.backends.recommended import (
    asked_for,
    check_recommendation,
    measured_otherwise,
    read_recommendation,
    trained_of,
)
from hvdtrain.bench.comparing import as_json, choose
from hvdtrain.bench.trial import Trial
from hvdtrain.errors import ConfigError, HvdtrainError
from hvdtrain.launch.detect import Detection
from hvdtrain.launch.machine import this_machine
from hvdtrain.settings.config import TrainConfig
from hvdtrain.topology import Topology


def topology(launcher: str = "torchrun", size: int = 2, nodes: int = 1) -> Topology:
    return Topology(
        rank=0,
        world_size=size,
        local_rank=0,
        local_world_size=size // nodes,
        node_rank=0,
        num_nodes=nodes,
        launcher=launcher,
    )


def record(best: str = "torch", launcher: str = "torchrun", **changed: Any) -> dict[str, Any]:
    fast, slow = (
        Trial(samples_per_second=rate, step_s=0.1, exchange_s=0.01, memory_bytes=1e6, launcher=launcher, device="cpu")
        for rate in (20.0, 10.0)
    )
    trials = {best: [fast], "horovod" if best != "horovod" else "torch": [slow]}
    whole = as_json(
        trials, choose(trials), commands={best: f"{launcher} -np 2"}, machine=this_machine().as_json(), world_size=2
    )
    return {**whole, **changed}


def written(folder: Path, content: dict[str, Any]) -> str:
    (folder / "engines.json").write_text(json.dumps(content))
    return str(folder / "engines.json")


def test_the_engine_that_was_the_fastest_is_taken(tmp_path):
    file = written(tmp_path, record())
    detection = Detection(topology=topology(), reason="torchrun: RANK=0", job_id="x")
    for run in (file, str(tmp_path)):
        name, reason = backends.choose(detection, f"auto:{run}")
        assert name == "torch"
        assert reason == f"torchrun: RANK=0, {file} -> torch"


def test_a_backend_is_made_of_it_and_another_device_is_refused(tmp_path):
    alone = record("local", "none", world_size=1)
    written(tmp_path, alone)
    with hvdtrain.init(f"auto:{tmp_path}", device="cpu") as backend:
        assert backend.name == "local"
    alone["launches"]["local"]["device"] = "cuda"
    written(tmp_path, alone)
    with pytest.raises(
        ConfigError, match=r"recommends local for cuda, and this run computes on cpu; give --device cuda"
    ):
        hvdtrain.init(f"auto:{tmp_path}", device="cpu")


@pytest.mark.parametrize(
    ("best", "launcher", "started", "host", "said"),
    [
        ("mpi", "mpirun", topology(), None, "launcher of mpi mpirun there, torchrun here"),
        ("torch", "torchrun", topology("mpirun"), None, "launcher of torch torchrun there, mpirun here"),
        ("torch", "torchrun", topology(size=4), None, "ranks 2 there, 4 here"),
        ("torch", "torchrun", topology(nodes=2), None, "nodes 1 there, 2 here"),
        ("torch", "torchrun", topology(), "elsewhere", "host .* there, elsewhere here"),
        ("horovod", "horovodrun", Topology.single(), None, "ranks 2 there, 1 here; launcher of horovod horovodrun there, none here"),
    ],
)  # fmt: skip
def test_what_differs_is_named_with_what_to_do(tmp_path, best, launcher, started, host, said):
    found = read_recommendation(written(tmp_path, record(best, launcher)))
    here = this_machine()
    with pytest.raises(ConfigError, match=said) as raised:
        check_recommendation(found, started, replace(here, host=host or here.host))
    assert f"Start it as it was measured ({launcher} -np 2)" in str(raised.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read (No such file or directory)"),
        ('{"benchmark": "engin', "is damaged"),
        ("[" * 100_000, "is damaged"),
        ("[]", "is no record of hvdtrain bench engines (it is [])"),
        ('{"benchmark": "collectives"}', "it is one of 'collectives'"),
        ('{"benchmark": "engines"}', "no 'best'"),
    ],
)
def test_a_record_that_is_missing_or_damaged_is_refused(tmp_path, content, said):
    if content is not None:
        (tmp_path / "engines.json").write_text(content)
    with pytest.raises(ConfigError) as raised:
        read_recommendation(str(tmp_path / "engines.json"))
    assert said in str(raised.value)
    assert "hvdtrain bench engines --out FILE" in str(raised.value)


ODD = [None, True, -1, 0, 2, 1.5, math.nan, 10**400, "", "torch", "x" * 2000, [], [1], ["mpi"], {}, {"torch": 1}]
PLACES = [
    ("best",), ("trained",), ("trained", "model"), ("rivals",), ("machine",), ("machine", "host"), ("machine", "cpus"), ("world_size",), ("launches",),
    ("launches", "torch"), ("launches", "torch", "launcher"), ("launches", "torch", "device"), ("benchmark",),
]  # fmt: skip


@given(place=st.sampled_from(PLACES), value=st.sampled_from(ODD))
def test_whatever_stands_in_a_record_it_is_understood_or_refused(tmp_path_factory, place, value):
    content = record(trained=trained_of(TrainConfig()))
    inner = content
    for name in place[:-1]:
        inner = inner[name]
    inner[place[-1]] = value
    file = written(tmp_path_factory.mktemp("record"), content)
    refused = ""
    try:
        found = read_recommendation(file)
        check_recommendation(found, topology(), this_machine())
    except HvdtrainError as error:
        refused = str(error)
    assert file in refused or found.best == "torch"


def test_what_was_trained_otherwise_is_said_and_followed_all_the_same(tmp_path):
    made = TrainConfig(model="mlp", batch_size=8)
    found = read_recommendation(written(tmp_path, record(trained=trained_of(made))))
    assert measured_otherwise(found, made) == ""
    said = measured_otherwise(found, replace(made, model="cnn"))
    assert said == f"{found.file} recommends torch for another training: --model mlp there, cnn here"
    assert measured_otherwise(read_recommendation(written(tmp_path, record())), made) == ""


def test_an_engine_that_is_not_known_here_is_refused(tmp_path):
    written(tmp_path, record("nickel", "none", world_size=1))
    with pytest.raises(ConfigError, match="unknown backend 'nickel'"):
        hvdtrain.init(f"auto:{tmp_path}")


def test_a_run_without_a_name_is_refused_and_others_are_no_runs():
    with pytest.raises(ConfigError, match="--backend auto: names no RUN"):
        TrainConfig(backend="auto:")
    assert TrainConfig(backend="auto:runs/x").backend == "auto:runs/x"
    assert asked_for("auto") is None
