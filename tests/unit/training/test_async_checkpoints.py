"""Checkpoints written beside the training: what was copied is what is written, one at a time, and no failure is silent."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest
import torch
from disk import full_disk
from torch import nn

import hvdtrain
from hvdtrain.data.arrays import ArrayDataset
from hvdtrain.errors import CheckpointError, Preempted
from hvdtrain.training.async_checkpoints import AsyncCheckpoints
from hvdtrain.training.checkpoint import Checkpoints, load
from hvdtrain.training.host_copy import HostCopy


class Gated(AsyncCheckpoints):
    """Writes when it is let, and keeps count."""

    def __init__(self, folder, **options):
        super().__init__(folder, **options)
        self.gate, self.began, self.trace = threading.Event(), threading.Event(), []

    def write(self, content, last=""):
        self.trace.append(("begins", content.step))
        self.began.set()
        assert self.gate.wait(30)
        path = super().write(content, last)
        self.trace.append(("ends", content.step))
        return path


def save(checkpoints, backend, step, model, **training):
    return checkpoints.save(backend, step=step, model=model.state_dict(), training=training, rank_state={"r": [step]})


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
        self.b.weight = self.a.weight
        self.register_buffer("halves", torch.randn(2, 3).bfloat16().t())
        self.register_buffer("image", torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last))
        self.register_buffer("none", torch.empty(0))


def test_what_is_written_is_the_state_at_the_save_however_it_changes_meanwhile(tmp_path, alone):
    checkpoints, model, other = Gated(tmp_path), Tied(), Tied()
    momentum = torch.randn(5)
    expected = {name: value.clone() for name, value in [*model.state_dict().items(), ("momentum", momentum)]}
    path = save(checkpoints, alone, 3, model, momentum=[momentum, momentum])
    with torch.no_grad():
        for value in [*model.state_dict().values(), momentum]:
            value.fill_(7)
    assert not any(tmp_path.glob("step-*"))
    checkpoints.gate.set()
    checkpoints.settle(alone)
    loaded = load(alone, path, other)
    assert all(torch.equal(other.state_dict()[name], expected[name]) for name in other.state_dict())
    assert other.image.is_contiguous(memory_format=torch.channels_last)
    assert other.a.weight is other.b.weight
    assert all(torch.equal(value, expected["momentum"]) for value in loaded.training["momentum"])
    assert loaded.rank_states == [{"r": [3]}]


def test_one_is_written_at_a_time_in_their_order(tmp_path, alone):
    checkpoints, model = Gated(tmp_path, keep=9), Tied()
    save(checkpoints, alone, 1, model)
    opener = threading.Timer(0.3, checkpoints.gate.set)
    opener.start()
    for step in (2, 3):
        save(checkpoints, alone, step, model)  # waits for the one before
    checkpoints.settle(alone)
    assert checkpoints.trace == [(what, step) for step in (1, 2, 3) for what in ("begins", "ends")]
    assert checkpoints.find(alone).step == 3


def test_whoever_reads_waits_for_what_is_being_written(tmp_path, alone):
    checkpoints = Gated(tmp_path)
    path = save(checkpoints, alone, 4, Tied())
    assert checkpoints.began.wait(30)
    threading.Timer(0.3, checkpoints.gate.set).start()
    assert checkpoints.find(alone).path == path


def test_memory_is_taken_once(tmp_path):
    copy, model = HostCopy(), Tied()
    first = copy.of(model.state_dict(), [1, {"x": torch.ones(3)}])
    places = {name: value.data_ptr() for name, value in first[0].items()}
    with torch.no_grad():
        model.a.weight.fill_(3)
    second = copy.of(model.state_dict(), [1, {"x": torch.ones(3)}])
    assert {name: value.data_ptr() for name, value in second[0].items()} == places
    assert torch.equal(second[0]["b.weight"], torch.full((3, 3), 3.0))
    assert second[0]["a.weight"].data_ptr() == second[0]["b.weight"].data_ptr() != model.a.weight.data_ptr()
    third = copy.of({"a": torch.ones(4)}, [])  # of another form
    assert torch.equal(third[0]["a"], torch.ones(4))


@pytest.mark.parametrize("told", ["settle", "save"])
def test_a_full_disk_is_told_once_and_leaves_the_earlier_ones(tmp_path, alone, told):
    checkpoints, model = AsyncCheckpoints(tmp_path), nn.Linear(300, 300)
    save(checkpoints, alone, 1, model)
    checkpoints.settle(alone)
    assert not checkpoints.failed()
    with full_disk(10_000):
        save(checkpoints, alone, 2, model)
        end = time.monotonic() + 30
        while not checkpoints.failed():
            assert time.monotonic() < end
            time.sleep(0.01)
        with pytest.raises(CheckpointError, match=r"could not write .*step-00000002"):
            checkpoints.settle(alone) if told == "settle" else save(checkpoints, alone, 3, model)
    assert not checkpoints.failed()
    checkpoints.settle(alone)
    assert [path.name for path in tmp_path.glob("*step*")] == ["step-00000001"]


def test_what_cannot_be_saved_at_all_is_told_too(tmp_path, alone):
    checkpoints = AsyncCheckpoints(tmp_path)
    checkpoints.save(alone, step=1, model={"w": torch.eye(2).to_sparse()}, training={}, rank_state={})
    with pytest.raises(CheckpointError, match="could not write"):
        checkpoints.settle(alone)


def test_a_wait_without_an_end_is_ended(tmp_path, alone):
    checkpoints = Gated(tmp_path, wait_s=0.1)
    save(checkpoints, alone, 1, Tied())
    with pytest.raises(CheckpointError, match=r"step 1 is still being written after 0\.1 s.*--checkpoint-async"):
        checkpoints.settle(alone)
    checkpoints.gate.set()
    checkpoints._writing.join(30)
    checkpoints.settle(alone)
    assert checkpoints.find(alone).step == 1


DATA = ArrayDataset(torch.linspace(-1, 1, 44).reshape(11, 4), torch.arange(11) % 3)


def trainer(backend, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    return model, hvdtrain.Trainer(backend, model, optimizer, loss=nn.functional.cross_entropy, **options)


def test_a_run_that_is_asked_to_stop_waits_for_its_checkpoint(tmp_path, alone):
    checkpoints = Gated(tmp_path)
    _, stopped = trainer(alone, checkpoints=checkpoints, stop_requested=lambda: True)
    threading.Timer(0.3, checkpoints.gate.set).start()
    with pytest.raises(Preempted, match="step-00000001"):
        stopped.fit(DATA, epochs=1, global_batch_size=4)
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-00000001"]


def test_a_fit_that_has_returned_has_written_everything(tmp_path, alone):
    checkpoints = AsyncCheckpoints(tmp_path)
    model, whole = trainer(alone, checkpoints=checkpoints)
    whole.fit(DATA, epochs=2, global_batch_size=4)
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-00000003", "step-00000006"]
    other = trainer(alone)[0]
    load(alone, Checkpoints(tmp_path).find(alone), other)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


WRITER = """
import sys, time
import torch
from torch import nn
from hvdtrain.backends.local import LocalBackend
from hvdtrain.launch.detect import Detection
from hvdtrain.topology import Topology
from hvdtrain.training.async_checkpoints import AsyncCheckpoints

class Slow(AsyncCheckpoints):
    def write(self, content, last=""):
        if content.step == 2:
            print("writing", flush=True)
            time.sleep(float(sys.argv[2]))
        return super().write(content, last)

checkpoints = Slow(sys.argv[1])
with LocalBackend(Detection(topology=Topology.single(), reason="", job_id="w"), device="cpu") as backend:
    for step in (1, 2):
        checkpoints.save(backend, step=step, model=nn.Linear(20, 20).state_dict(), training={}, rank_state={})
    raise SystemExit("an end that nobody foresaw")
"""


def test_the_end_of_a_process_waits_for_its_checkpoint(tmp_path, alone):
    ended = subprocess.run(
        [sys.executable, "-c", WRITER, str(tmp_path), "0.5"], capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.returncode == 1, ended.stderr
    assert Checkpoints(tmp_path).find(alone).step == 2


@pytest.mark.slow
def test_a_kill_leaves_the_checkpoint_before(tmp_path, alone):
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path), "60"], stdout=subprocess.PIPE, text=True
    ) as job:
        assert job.stdout.readline() == "writing\n"
        job.kill()
    assert Checkpoints(tmp_path).find(alone).step == 1
