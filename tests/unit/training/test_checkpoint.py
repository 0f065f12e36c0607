"""Checkpoints are whole or absent: damage, a full disk, kills, another model."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from disk import small_disk
from torch import nn

from hvdtrain.errors import CheckpointError
from hvdtrain.training.checkpoint import Checkpoints, load, model_state
from hvdtrain.training.checkpoint_files import FILES


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 3)
        self.b = nn.Linear(3, 3)
        self.b.weight = self.a.weight
        self.register_buffer("none", torch.empty(0))
        self.register_buffer("count", torch.tensor(7))
        self.register_buffer("halves", torch.ones(2, 3, dtype=torch.bfloat16).t())


def save(checkpoints, backend, step, model):
    return checkpoints.save(
        backend, step=step, model=model.state_dict(), training={"x": step}, rank_state={"r": [step]}
    )


def test_everything_comes_back_as_it_was_saved(tmp_path, alone):
    checkpoints, model, other = Checkpoints(tmp_path), Tied(), Tied()
    path = save(checkpoints, alone, 3, model)
    loaded = load(alone, path, other)
    assert (loaded.step, loaded.training, loaded.rank_states) == (3, {"x": 3}, [{"r": [3]}])
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)
    assert other.a.weight is other.b.weight


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_numbers_come_back_equal_in_every_bit(tmp_path, alone, dtype):
    def made():
        model = nn.Sequential(nn.Linear(3, 2, dtype=dtype), nn.Linear(3, 2, dtype=dtype))
        model[1].weight = model[0].weight
        model.register_buffer("conjugate", torch.randn(3, 2, dtype=dtype).t().conj())
        model.register_buffer("pair", torch.randn(3, 2))  # not to be taken for complex numbers
        return model

    model, other = made(), made()
    path = save(Checkpoints(tmp_path), alone, 1, model)
    load(alone, path, other)
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)


def test_the_newest_are_kept(tmp_path, alone):
    checkpoints, model = Checkpoints(tmp_path, keep=2), Tied()
    for step in (1, 2, 10, 10, 11):
        save(checkpoints, alone, step, model)
    assert sorted(p.name for p in tmp_path.glob("*") if p.name != ".lock") == ["step-00000010", "step-00000011"]


@pytest.mark.parametrize("file", ["model.safetensors", *FILES, "manifest.json"])
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(tmp_path, alone, caplog, file):
    checkpoints, model = Checkpoints(tmp_path), Tied()
    for step in (1, 2):
        save(checkpoints, alone, step, model)
    damaged = tmp_path / "step-00000002" / file
    damaged.write_bytes(damaged.read_bytes()[:-5])
    assert checkpoints.latest().step == 1
    assert file in caplog.text
    with pytest.raises(CheckpointError, match=file):
        load(alone, tmp_path / "step-00000002", model)


def test_another_model_is_named(tmp_path, alone):
    path = save(Checkpoints(tmp_path), alone, 1, nn.Linear(3, 3))
    with pytest.raises(CheckpointError, match=r"weight is \(3, 3\).*the model's \(4, 3\)"):
        load(alone, path, nn.Linear(3, 4))


def test_what_was_found_whole_is_not_read_twice(tmp_path, alone):
    checkpoints, model = Checkpoints(tmp_path), nn.Linear(3, 3)
    path = save(checkpoints, alone, 7, model)
    found = checkpoints.find(alone)
    assert (found.path, found.step) == (path, 7)
    os.remove(os.path.join(path, "manifest.json"))
    assert load(alone, found, nn.Linear(3, 3)).step == 7


def test_a_checkpoint_is_found_by_its_folder_or_as_the_newest(tmp_path, alone):
    checkpoints = Checkpoints(tmp_path / "none yet")
    assert checkpoints.find(alone) is None
    path = save(checkpoints, alone, 3, nn.Linear(1, 1))
    assert checkpoints.find(alone) == checkpoints.find(alone, path)
    with pytest.raises(CheckpointError, match="is no checkpoint"):
        checkpoints.find(alone, tmp_path)


class Partly(nn.Module):
    def __init__(self, compiled):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        self.head = nn.Linear(4, 2)
        if compiled:
            self.encoder = torch.compile(self.encoder, backend="eager")

    def forward(self, x):
        return self.head(self.encoder(x))


MODELS = {
    "plain": lambda: Partly(False),
    "compiled": lambda: torch.compile(Partly(False), backend="eager"),
    "compiled in part": lambda: Partly(True),
    "compiled in part and whole": lambda: torch.compile(Partly(True), backend="eager"),
}


@pytest.mark.parametrize("written", MODELS)
@pytest.mark.parametrize("read", MODELS)
def test_a_compiled_model_has_plain_names_and_either_kind_reads_the_other(tmp_path, alone, written, read):
    one, other = MODELS[written](), MODELS[read]()
    assert list(model_state(one)) == list(Partly(False).state_dict())
    path = Checkpoints(tmp_path).save(alone, step=1, model=model_state(one), training={}, rank_state={})
    load(alone, path, other)
    for name, value in model_state(one).items():
        assert torch.equal(model_state(other)[name], value)


def test_a_checkpoint_with_a_compilers_names_is_read(tmp_path, alone):
    one = torch.compile(nn.Linear(3, 3), backend="eager")
    path = Checkpoints(tmp_path).save(alone, step=1, model=one.state_dict(), training={}, rank_state={})
    other = nn.Linear(3, 3)
    load(alone, path, other)
    assert torch.equal(other.weight, one.weight)


def test_names_that_a_compiler_would_make_equal_are_refused():
    model = nn.ModuleDict({"_orig_mod": nn.Linear(1, 1)})
    model.register_parameter("weight", nn.Parameter(torch.zeros(1)))
    with pytest.raises(CheckpointError, match="several tensors named 'weight'"):
        model_state(model)


def test_a_path_that_is_no_checkpoint_is_refused(tmp_path, alone):
    with pytest.raises(CheckpointError, match="no checkpoint"):
        load(alone, tmp_path / "nevr", nn.Linear(1, 1))


# What fills the disk: a file of the checkpoint, at each of its places.
FILLING = {
    "the model": ({"w": torch.ones(10**6)}, {}, {}),
    "a state's tensors": ({}, {"x": torch.ones(10**6)}, {}),
    "a state's JSON": ({}, {"x": "x" * 10**7}, {}),
    "a rank's state": ({}, {}, {"x": [torch.ones(10**6)]}),
}


@pytest.mark.parametrize("what", FILLING)
def test_a_full_disk_is_said_and_leaves_the_earlier_ones(tmp_path, alone, what):
    checkpoints, (model, training, rank_state) = Checkpoints(tmp_path), FILLING[what]
    with small_disk(tmp_path):
        save(checkpoints, alone, 1, nn.Linear(3, 3))
        for _ in range(2):
            with pytest.raises(
                CheckpointError, match=r"could not write .*step-00000002: .*Earlier checkpoints are unharmed"
            ):
                checkpoints.save(alone, step=2, model=model, training=training, rank_state=rank_state)
            assert [p.name for p in tmp_path.iterdir() if p.name != ".lock"] == ["step-00000001"]
        assert checkpoints.latest().step == 1
        save(checkpoints, alone, 2, nn.Linear(3, 3))
        assert checkpoints.latest().step == 2
        checkpoints.release()


WRITER = """
import sys
from torch import nn
from hvdtrain.backends.local import LocalBackend
from hvdtrain.launch.detect import Detection
from hvdtrain.topology import Topology
from hvdtrain.training.checkpoint import Checkpoints
model = nn.Linear(200, 200)
with LocalBackend(Detection(topology=Topology.single(), reason="", job_id="w"), device="cpu") as backend:
    for step in range(1, 10**6):
        Checkpoints(sys.argv[1], keep=2).save(
            backend, step=step // 2 + 1, model=model.state_dict(), training={}, rank_state={})
        print(step, flush=True)
"""


def test_a_writer_that_is_killed_leaves_a_whole_checkpoint(tmp_path, alone):
    chance = random.Random(0)
    for _ in range(3):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        writer.stdout.readline()
        time.sleep(chance.uniform(0.05, 0.3))
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
        newest = Checkpoints(tmp_path).latest()
        assert newest is not None
        assert load(alone, newest, nn.Linear(200, 200)) is not None
        assert not list(tmp_path.glob("partial-*"))


@pytest.mark.parametrize(
    "make", [Path.touch, os.mkfifo, lambda path: path.symlink_to("nowhere")], ids=["file", "fifo", "link"]
)
def test_what_stands_in_the_place_of_the_folder_is_named(tmp_path, make):
    folder = tmp_path / "run" / "checkpoints"
    folder.parent.mkdir()
    make(folder)
    with pytest.raises(CheckpointError, match=rf"can be written in {folder}: File exists"):
        Checkpoints(folder).claim()
