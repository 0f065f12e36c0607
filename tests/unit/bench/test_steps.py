"""What launches of a timed step, and steps at several numbers of ranks, come to."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from hvdtrain.bench.fitting import Fit, fit_ring
from hvdtrain.bench.forms import Link
from hvdtrain.bench.scaling import (
    Assumed,
    Scaled,
    fitted_rows,
    measured_rows,
    numbers_of,
    project,
    projected_rows,
    unseen,
)
from hvdtrain.bench.scaling import as_json as scaling_json
from hvdtrain.bench.spread import Spread
from hvdtrain.bench.step_models import OWN, check_model_name, gradient_bytes, model_and_batch
from hvdtrain.bench.steps import ALONE, Launch, Steps, as_json, read_launch, rows, unlike
from hvdtrain.cli import main
from hvdtrain.errors import ConfigError


def launch(*seconds: float, loss: float = 2.0, joules: float | None = None) -> Launch:
    return Launch(seconds=list(seconds), began=0.0, ended=1.0, third_loss=loss, memory_bytes=5e8, joules=joules)


def test_rates_are_of_all_ranks_and_iterations_and_around_them_is_what_horovods_script_says():
    steps = Steps(samples=100, batches=10, launches={ALONE: [launch(1.0)], "torch": [launch(2.0), launch(4.0)]})
    assert rows(steps) == [
        ["", "samples/s", "±", "step ms", "quartiles", "to alone", "memory"],
        [ALONE, "100.0", "0.0", "100", "100-100", "1.00", "500 MB"],
        ["torch", "37.5", "24.5", "300", "250-350", "3.00", "500 MB"],  # 50 and 25, deviation 12.5
    ]
    found = json.loads(json.dumps(as_json(steps, model="mlp")))
    assert found["results"]["torch"]["iterations"] == 2


def test_joules_are_those_of_a_sample():
    steps = Steps(samples=100, batches=10, launches={"torch": [launch(1.0, 1.0, joules=40.0)]})
    assert rows(steps)[0][-1] == "J/sample"
    assert rows(steps)[1][-1] == "0.2"


def test_who_trains_otherwise_is_named_and_who_is_alone_may():
    alike = {ALONE: [launch(1.0, loss=9.0)], "torch": [launch(1.0)], "mpi": [launch(1.0, loss=2.0001)]}
    assert unlike(Steps(samples=1, batches=1, launches=alike)) == ""
    wrong = Steps(samples=1, batches=1, launches={**alike, "horovod": [launch(1.0, loss=2.1)]})
    assert unlike(wrong) == "these do not train alike: the third loss is 2.0001, but horovod 2.1."
    once = {**alike, "horovod": [launch(1.0, loss=2.1), launch(1.0)]}  # in a round that is not the last
    assert unlike(Steps(samples=1, batches=1, launches=once)).endswith("but horovod 2.1.")


def test_an_iteration_lasts_as_long_as_on_the_slowest_rank(tmp_path):
    for rank in (0, 1):
        own = {
            "seconds": [1.0 + rank, 3.0 - rank],
            "began": rank,
            "ended": 9 + rank,
            "third_loss": rank,
            "memory_bytes": rank,
        }
        (tmp_path / f"rank{rank}.json").write_text(json.dumps(own))
    found = read_launch(tmp_path, 2)
    assert (found.seconds, found.began, found.ended, found.third_loss, found.memory_bytes) == ([2.0, 3.0], 0, 10, 0, 1)
    with pytest.raises(ConfigError, match="not all of 3 ranks"):
        read_launch(tmp_path, 3)


@pytest.mark.parametrize("name", OWN)
def test_models_are_the_same_on_every_rank_and_batches_are_not(name):
    (one, x, y), (other, x1, _) = (model_and_batch(name, 3, 224, rank) for rank in (0, 1))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert not torch.equal(x, x1)
    assert one(x).shape[0] == len(y) == 3
    assert one(x).shape[1] > y.max()
    assert gradient_bytes(name, 4) == 4 * sum(parameter.numel() for parameter in one.parameters())


def test_a_model_that_is_not_known_is_refused_with_the_nearest():
    pytest.importorskip("torchvision")
    check_model_name("resnet18")
    with pytest.raises(ConfigError, match="does not know 'resnet51'; did you mean 'resnet50'"):
        check_model_name("resnet51")


def scaled() -> Scaled:
    fit = Fit(link=Link(latency_s=1e-5, bytes_per_s=1e9), error=0.1, points=9)
    return Scaled(steps={1: Spread.of([0.1]), 2: Spread.of([0.125])}, fits={2: fit}, gradient_bytes=10**8, samples=8)


def test_efficiency_and_what_the_model_says_stand_beside_each_other():
    found = scaled()
    assert found.efficiency(2) == pytest.approx(0.8)
    expected = 0.1 + found.predicted_s(2) - 0.1
    assert measured_rows({"mpi": found})[2] == [
        "mpi", "2", "128.0", "125", "125-125", "80 %", f"{1e3 * expected:.4g}", f"{100 * (expected / 0.125 - 1):+.0f} %"
    ]  # fmt: skip
    assert fitted_rows({"mpi": found})[1] == ["mpi", "2", "10", "1", "10 %"]


@pytest.mark.parametrize(
    ("points", "row", "says"),
    [
        ([(4, 1e-5), (64, 1e-5), (4096, 1e-5)], ["10", "-"], "took no longer"),
        ([(1e3, 1e-5), (1e4, 1e-4), (1e5, 1e-3)], ["-", "0.05"], "show no latency"),
    ],
)
def test_a_link_of_which_the_sizes_show_one_side_is_told(points, row, says):
    found = replace(scaled(), fits={2: fit_ring([(size, 2 * seconds) for size, seconds in points], 2)})
    assert fitted_rows({"mpi": found})[1][2:4] == row
    assert [says in line for line in unseen({"mpi": found, "torch": scaled()})] == [True]
    link = scaling_json({"mpi": found}, {})["results"]["mpi"]["links"]["2"]
    assert (link["latency_s"] is None, link["bytes_per_s"] is None) == (row[0] == "-", row[1] == "-")


def test_a_projection_uses_the_given_link_between_nodes():
    slow, fast = (
        project(scaled(), Assumed(ranks=[2, 64], ranks_per_node=2, link=link, ratio=16, diloco_steps=100))
        for link in (Link(latency_s=1e-4, bytes_per_s=1e8), None)
    )
    assert dict(slow["ring"])[2] == dict(fast["ring"])[2]  # on one node
    assert dict(slow["ring"])[64] < dict(fast["ring"])[64]
    assert projected_rows(fast, 16, 100)[0] == ["", "2 ranks", "64 ranks"]
    whole = json.loads(json.dumps(scaling_json({"mpi": scaled()}, {"mpi": fast})))
    assert whole["results"]["mpi"]["projected_efficiency"]["diloco"]["64"] > 0


def test_what_ranks_of_one_machine_take_from_each_other_is_kept_in_a_projection():
    crowded = replace(scaled(), steps={1: Spread.of([0.1]), 2: Spread.of([0.4])}, gradient_bytes=4)
    found = project(crowded, Assumed(ranks=[2, 64], ranks_per_node=2, link=None, ratio=16, diloco_steps=100))
    assert dict(found["ring"])[2] == pytest.approx(0.25, rel=1e-3)
    assert all(value <= 0.2501 for points in found.values() for _, value in points)


def test_numbers_are_read_in_order_and_once():
    assert numbers_of("--ranks", "4, 1,2,2", most=1024) == [1, 2, 4]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["step", "--model", "resnet51"], "does not know 'resnet51'"),
        (["step", "--out", "/dev/null/x"], "could not write"),
        (["scaling", "--ranks", "2,4"], "one rank is what others are compared with"),
        (["scaling", "--ranks", "1,zwei"], "--ranks 1,zwei: give numbers from 1 to 1024"),
        (["scaling", "--project", "0"], "--project 0: give numbers"),
        (["scaling", "--link-gbit", "25"], "--link-gbit and --link-us describe one link"),
        (["scaling", "--plot", "x.png"], "--plot draws a projection"),
        (["scaling", "--profile", "1:2"], "--profile"),
    ],
)
def test_wrong_flags_are_refused_before_anything_is_measured(capsys, monkeypatch, tmp_path, words, said):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", *words]) in (1, 2)
    shown = capsys.readouterr()
    assert said in shown.err
    assert "round" not in shown.out
