"""What rank 0 finds wrong with a run's folder is the same error on every rank, and all of them can go on afterwards."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import hvdtrain
from hvdtrain.errors import CheckpointError

pytestmark = pytest.mark.feature("checkpoints")


def state(backend):
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    return hvdtrain.LoopState(backend, backend.replicate(model, torch.optim.SGD(model.parameters(), lr=0.1)))


def folder_of(backend, tmp_path):
    return Path(backend.broadcast_object(str(tmp_path))) / "checkpoints"


def told_everywhere(backend, action, message):
    with pytest.raises(CheckpointError, match=message) as told:
        action()
    assert len(set(backend.all_gather_object(str(told.value)))) == 1
    assert float(backend.all_reduce(torch.ones(()), "sum")) == backend.world_size


def put(backend, checkpoints, state, step):
    state.save(checkpoints, step)
    checkpoints.settle(backend)


HOLDER = """
import sys
from pathlib import Path
from hvdtrain.folder_lock import take
lock = take(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


def test_a_folder_that_another_job_writes_in_is_refused_on_every_rank(backend, tmp_path):
    folder, one = folder_of(backend, tmp_path), state(backend)
    holder = None
    if backend.rank == 0:
        folder.mkdir()
        argv = [sys.executable, "-c", HOLDER, str(folder / ".lock")]
        holder = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert holder.stdout.readline() == "held\n"
    backend.barrier()
    checkpoints = hvdtrain.Checkpoints(folder)
    told_everywhere(backend, lambda: put(backend, checkpoints, one, 2), "is in use by another job")
    if holder is not None:
        holder.communicate()
    put(backend, checkpoints, one, 3)
    assert checkpoints.find(backend).step == 3
    checkpoints.release()


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_only_damaged_checkpoints_are_refused_on_every_rank(backend, tmp_path, damage):
    folder, one = folder_of(backend, tmp_path), state(backend)
    checkpoints = hvdtrain.Checkpoints(folder)
    put(backend, checkpoints, one, 1)
    if backend.rank == 0:
        file = folder / "step-00000001" / "model.safetensors"
        file.write_bytes(file.read_bytes()[:20]) if damage == "cut" else file.unlink()
    backend.barrier()
    told_everywhere(backend, lambda: checkpoints.find(backend), "none of the 1 checkpoints")
    told_everywhere(backend, lambda: checkpoints.find(backend, folder / "step-00000001"), "model.safetensors")
    told_everywhere(backend, lambda: checkpoints.find(backend, folder / "nowhere"), "nowhere")
    checkpoints.release()


def test_a_new_line_sets_the_old_one_aside_for_every_rank(backend, tmp_path):
    folder, one = folder_of(backend, tmp_path), state(backend)
    checkpoints = hvdtrain.Checkpoints(folder)
    for step in (5, 6):
        put(backend, checkpoints, one, step)
    checkpoints.release()
    again = hvdtrain.Checkpoints(folder)
    if backend.rank == 0:
        assert "set aside" in again.begin(None)
    backend.barrier()
    put(backend, again, one, 1)
    assert again.find(backend).step == 1
    assert sorted(p.name for p in folder.with_name("checkpoints.1").glob("step-*")) == [
        "step-00000005",
        "step-00000006",
    ]
    again.release()


def test_another_model_or_optimizer_is_refused_on_every_rank(backend, tmp_path):
    checkpoints, one = hvdtrain.Checkpoints(folder_of(backend, tmp_path)), state(backend)
    put(backend, checkpoints, one, 1)
    other = nn.Linear(3, 4)
    replica = backend.replicate(other, torch.optim.SGD(other.parameters(), lr=0.1))
    told_everywhere(
        backend,
        lambda: hvdtrain.LoopState(backend, replica).load(checkpoints, lambda model: model(torch.ones(1, 3)).sum()),
        "model",
    )
    model = nn.Linear(3, 2)
    replica = backend.replicate(model, torch.optim.Adam(model.parameters()))
    told_everywhere(
        backend,
        lambda: hvdtrain.LoopState(backend, replica).load(checkpoints, lambda model: model(torch.ones(1, 3)).sum()),
        "optimizer",
    )
    checkpoints.release()
