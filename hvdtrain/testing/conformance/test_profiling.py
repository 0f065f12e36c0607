"""Profiles of some steps: a trace with every rank on one clock, and what binds the step, named where it was planted."""

import json
import time
from pathlib import Path
from statistics import median

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

import hvdtrain
from hvdtrain.compression.base import Compression, Sent, Sum
from hvdtrain.data.arrays import ArrayDataset
from hvdtrain.profiling.profiler import Profiler
from hvdtrain.settings.profiling import ProfiledSteps

pytestmark = pytest.mark.feature("trainer")

DELAY_S = 0.04


@pytest.fixture
def folder(backend, tmp_path_factory):
    made = tmp_path_factory.mktemp("profiled") if backend.rank == 0 else ""
    return Path(backend.broadcast_object(str(made))) / "profile"


class Slow(ArrayDataset):
    def __getitem__(self, index):
        time.sleep(DELAY_S / 4)
        return super().__getitem__(index)


class SlowLink(Compression):
    """What is summed arrives late."""

    name = "slow-link"

    def exchange(self, tensor, memory, seed):
        total = yield Sum(tensor)
        time.sleep(DELAY_S)
        return Sent(total, tensor)


class Deep(nn.Module):
    """Much to be computed, and few numbers to be exchanged."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def forward(self, x):
        product = torch.ones(700, 700)
        for _ in range(8):
            product = product @ torch.eye(700)
        return self.layer(x) * product.mean()


def profiled(backend, folder, planted, *, steps=(3, 6), max_steps=10):
    """Train with something planted; return what rank 0 said and wrote."""
    torch.manual_seed(0)
    model = Deep() if planted == "compute" else nn.Linear(4, 1)
    options = {"compression": SlowLink()} if planted == "exchange" else {}
    kind = Slow if planted == "input" else ArrayDataset
    data = kind(torch.randn(400, 4), torch.randn(400, 1))
    late = 2 if planted == "a slow rank" and backend.rank == backend.world_size - 1 else 0

    def loss(output, target):
        time.sleep(DELAY_S if planted == "Python" else DELAY_S * late)
        return mse_loss(output, target)

    said = []
    profiler = Profiler(backend, ProfiledSteps(*steps), folder, said.append)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    trainer = hvdtrain.Trainer(backend, model, optimizer, loss=loss, callbacks=[profiler], **options)
    trainer.fit(data, epochs=1, global_batch_size=4 * backend.world_size, max_steps=max_steps)
    profiler.finish(trainer)
    assert trainer.laps.listeners == []
    backend.barrier()
    file = folder / "verdict.json"
    return said, json.loads(file.read_text()) if file.exists() else None


@pytest.mark.timing
@pytest.mark.parametrize("planted", ["input", "Python", "compute", "exchange"])
def test_what_binds_the_step_is_named(backend, folder, planted):
    if planted == "exchange" and backend.world_size == 1:
        return  # nothing is exchanged
    said, verdict = profiled(backend, folder, planted)
    assert verdict["binds"] == planted, verdict
    assert verdict["shares"][planted] > 0.4
    assert verdict["steps"] == 4
    assert sum(verdict["shares"].values()) == pytest.approx(1)
    assert len(verdict["ranks"]) == backend.world_size
    assert (verdict["hidden"] is None) == (backend.world_size == 1)
    if backend.rank == 0:
        assert said[0].startswith(f"{planted} binds the step: ")
        assert ("By itself the exchange takes" in said[0]) == (backend.world_size > 1)
    else:
        assert said == []


@pytest.mark.timing
def test_the_rank_for_which_the_others_wait_is_looked_at(backend, folder):
    said, verdict = profiled(backend, folder, "a slow rank")
    assert verdict["binds"] == "Python"
    assert verdict["rank"] == backend.world_size - 1
    if backend.world_size > 1:
        assert verdict["ranks"][0]["exchange"] > DELAY_S
        assert backend.rank != 0 or f"of rank {backend.world_size - 1}, for which others wait" in said[0]


def test_the_trace_has_a_process_for_every_rank_on_one_clock(backend, folder):
    _, verdict = profiled(backend, folder, "none")
    trace = json.loads((folder / "trace.json").read_text())
    events = trace["traceEvents"]
    names = {
        event["pid"]: event["args"]["name"]
        for event in events
        if event["ph"] == "M" and event["name"] == "process_name"
    }
    for rank in range(backend.world_size):
        (process,) = [pid for pid, name in names.items() if name.split(":")[0].startswith(f"rank {rank} on ")]
        own = [event for event in events if event["pid"] == process]
        assert len([event for event in own if event.get("cat") == "cpu_op"]) > 20
        phases = [event for event in own if event.get("cat") == "phase"]
        assert len([event for event in phases if event["name"] == "forward"]) == 4
    assert min(event["ts"] for event in events if "ts" in event and event["ph"] != "M") == 0
    assert all(error["error_us"] < 1e5 for error in trace["clocks"].values())
    assert verdict["clock_error_us"] < 1e5


@pytest.mark.timing
def test_no_rank_leaves_an_exchange_before_all_have_come_to_it_on_the_common_clock(backend, folder):
    profiled(backend, folder, "Python")
    trace = json.loads((folder / "trace.json").read_text())
    begun, ended = {}, {}
    for event in trace["traceEvents"]:
        if event.get("cat") == "phase" and event["name"] == "backward":
            begun.setdefault(event["pid"], []).append(event["ts"])
        elif event.get("cat") == "phase" and event["name"] == "optimizer":
            ended.setdefault(event["pid"], []).append(event["ts"] + event["dur"])
    assert len(begun) == len(ended) == backend.world_size
    error_us = sum(error["error_us"] for error in trace["clocks"].values())
    for steps in ended.values():
        early = [max(others[step] for others in begun.values()) - steps[step] for step in range(4)]
        assert median(early) < error_us


def test_tables_of_operators_and_of_python_are_there(backend, folder):
    profiled(backend, folder, "compute", steps=(2, 3), max_steps=8)
    assert "aten::mm" in (folder / "operators.txt").read_text()
    if backend.rank == 0:
        assert "function calls" in (folder / "python.txt").read_text()
        assert "forward" in (folder / "python.txt").read_text()


def test_a_run_that_ends_in_the_middle_is_profiled_so_far_and_one_that_never_comes_so_far_says_so(backend, folder):
    said, verdict = profiled(backend, folder, "none", steps=(3, 100), max_steps=5)
    assert verdict["steps"] == 3
    said, verdict = profiled(backend, folder.with_name("late"), "none", steps=(50, 60), max_steps=5)
    assert verdict is None
    assert said == ["nothing was profiled: --profile 50:60, and the run ended after step 5"][: backend.rank == 0]


def test_an_evaluation_between_the_steps_is_none_of_them_and_a_step_that_never_came_counts_for_nothing(backend, folder):
    """Two steps an epoch and an evaluation of 0.3 s after each; the run ends in the middle of what is asked for."""

    class Task:
        def loss(self, model, batch):
            time.sleep(DELAY_S)
            return mse_loss(model(batch[0]), batch[1])

        def metrics(self, model, batch):
            time.sleep(0.3)
            return {"loss": mse_loss(model(batch[0]), batch[1])}

    data = ArrayDataset(torch.randn(2 * backend.world_size, 4), torch.randn(2 * backend.world_size, 1))
    model = nn.Linear(4, 1)
    said = []
    profiler = Profiler(backend, ProfiledSteps(1, 100), folder, said.append)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    trainer = hvdtrain.Trainer(backend, model, optimizer, task=Task(), callbacks=[profiler])
    trainer.fit(data, data, epochs=3, global_batch_size=backend.world_size, eval_batch_size=2)
    profiler.finish(trainer)
    backend.barrier()
    verdict = json.loads((folder / "verdict.json").read_text())
    assert verdict["steps"] == 6
    for rank in verdict["ranks"]:
        assert rank["python"] > 0.95 * DELAY_S  # a sixth of it was missing, with seven steps
        assert rank["input"] < 0.1  # 0.15 would be the evaluations
    assert not (folder / "python.txt").exists()
    assert backend.rank != 0 or said[-1].startswith("no python.txt is written")


def test_without_room_for_the_events_of_some_rank_the_run_goes_on_and_says_why_there_is_no_profile(
    backend, folder, tmp_path, monkeypatch, logged
):
    if backend.rank == backend.world_size - 1:  # not the only one that must not be left waiting
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "not there"))
    _, verdict = profiled(backend, folder, "none", steps=(2, 3), max_steps=8)
    assert verdict is None
    assert not (folder / "trace.json").exists()
    if backend.rank == 0:
        culprit = f"nothing is written of the steps that --profile recorded: rank {backend.world_size - 1}: "
        assert any(culprit in message and "TMPDIR" in message for message in logged)
        assert (folder / "python.txt").exists()


def test_the_first_step_can_be_profiled(backend, folder):
    _, verdict = profiled(backend, folder, "none", steps=(1, 1), max_steps=2)
    assert verdict["steps"] == 1


def test_one_that_is_closed_in_the_middle_writes_nothing_and_another_can_follow(backend, folder):
    said = []

    class Ends:
        def on_step(self, trainer, event):
            if event.step == 4:
                raise KeyboardInterrupt

    model = nn.Linear(4, 1)
    profiler = Profiler(backend, ProfiledSteps(2, 8), folder, said.append)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    trainer = hvdtrain.Trainer(backend, model, optimizer, loss=mse_loss, callbacks=[profiler, Ends()])
    data = ArrayDataset(torch.randn(80, 4), torch.randn(80, 1))
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(data, epochs=1, global_batch_size=4)
    profiler.close()
    profiler.close()
    assert said == []
    assert not (folder / "trace.json").exists()
    _, verdict = profiled(backend, folder, "none")
    assert verdict["steps"] == 4
