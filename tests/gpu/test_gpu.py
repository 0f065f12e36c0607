"""On CUDA GPUs: every engine trains, one GPU may serve several ranks, and results are those of the CPU."""

from __future__ import annotations

import json

import pytest
import torch
from launching import HOROVOD_GLOO, HOROVOD_MPI, LOCAL, MPI, TORCH, run

GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(GPUS == 0, reason="there is no CUDA GPU")]
FLAGS = ["--epochs", "1", "--seed", "1", "--global-batch-size", "60", "--precision", "fp64"]


def summary(folder):
    return json.loads((folder / "summary.json").read_text())


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cpu")
    ended = run(LOCAL.hvdtrain(1, *FLAGS, "--device", "cpu", "--run-dir", str(folder)))
    assert ended.code == 0, ended.output
    return summary(folder)


@pytest.mark.parametrize(
    ("launch", "ranks", "device"),
    [
        (LOCAL, 1, "cuda"),
        (TORCH, GPUS, "cuda"),
        (MPI, 2, "cuda:0"),
        (HOROVOD_MPI, GPUS, "cuda"),
        (HOROVOD_GLOO, GPUS, "cuda"),
    ],
    ids=str,
)
def test_training_gives_the_cpus_result(on_cpu, tmp_path, launch, ranks, device):
    ended = run(launch.hvdtrain(ranks, *FLAGS, "--device", device, "--run-dir", str(tmp_path)))
    assert ended.code == 0, ended.output
    found = summary(tmp_path)
    assert found["device"].startswith("cuda")
    assert abs(found["eval_loss"] - on_cpu["eval_loss"]) < 1e-6


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_mixed_precision_learns(tmp_path, precision):
    flags = ["--epochs", "3", "--precision", precision, "--device", "cuda", "--run-dir", str(tmp_path)]
    ended = run(TORCH.hvdtrain(GPUS, *flags))
    assert ended.code == 0, ended.output
    assert summary(tmp_path)["eval_accuracy"] > 0.9


@pytest.mark.parametrize("launch", [TORCH, MPI], ids=str)
def test_the_backend_keeps_every_promise(launch):
    ranks, device = (GPUS, "cuda") if launch is TORCH else (2, "cuda:0")
    ended = run(
        launch.argv(ranks, "-m", "hvdtrain.testing", "--backend", launch.backend, "--device", device), timeout_s=600
    )
    assert ended.code == 0, ended.output[-6000:]


def test_several_gpus_in_one_process(tmp_path):
    if GPUS < 2:
        pytest.skip("there is one GPU")
    ended = run(LOCAL.hvdtrain(1, *FLAGS, "--data-parallel", "--device", "cuda", "--run-dir", str(tmp_path)))
    assert ended.code == 0, ended.output


MPI_SCRIPT = """
import torch, torch.distributed as dist, hvdtrain.mpi
dist.init_process_group("mpi4py")
rank, size = dist.get_rank(), dist.get_world_size()
device = torch.device("cuda:0")
stream = torch.cuda.Stream(device)
for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.int64):
    with torch.cuda.stream(stream):  # values that are still being made when the operation is handed over
        big = torch.ones(4000, 4000, device=device)
        for _ in range(20):
            big = big @ big / 4000
        tensor = (big[0, :1000] * (rank + 1)).to(dtype)
        work = dist.all_reduce(tensor, async_op=True)
        work.wait()
        assert tensor.eq(sum(range(1, size + 1))).all(), (dtype, tensor[:4])
    strided = torch.full((10, 10), rank + 1, device=device, dtype=dtype).t()[::2]
    dist.all_reduce(strided)
    assert strided.eq(sum(range(1, size + 1))).all()
    parts = [torch.empty(3, device=device, dtype=dtype) for _ in range(size)]
    dist.all_gather(parts, torch.full((3,), rank, device=device, dtype=dtype))
    assert [part[0].item() for part in parts] == list(range(size))
    if rank == 0:
        dist.send(torch.full((5,), 7, device=device, dtype=dtype), 1)
    if rank == 1:
        got = torch.zeros(5, device=device, dtype=dtype)
        dist.recv(got, 0)
        assert got.eq(7).all()
dist.barrier()
print("rank", rank, "done", flush=True)
dist.destroy_process_group()
"""


def test_gpu_tensors_go_through_mpi_in_order_with_their_stream(tmp_path):
    file = tmp_path / "script.py"
    file.write_text(MPI_SCRIPT)
    ended = run(MPI.argv(2, str(file)), HVDTRAIN_MPI_CUDA="staged")
    assert ended.code == 0, ended.output
    assert ended.output.count("done") == 2


HOROVOD_SCRIPT = """
import torch
import hvdtrain.horovod as hvd
hvd.init()
device = torch.device("cuda", hvd.local_rank())
torch.cuda.set_device(device)
stream = torch.cuda.Stream(device)
total = sum(range(1, hvd.size() + 1))
for numel in (1, 1000, 2_000_000):  # inside a message, with others, by itself
    for step in range(5):
        with torch.cuda.stream(stream):  # values that are still being made when the operation is asked for
            big = torch.ones(4000, 4000, device=device)
            for _ in range(20):
                big = big @ big / 4000
            tensor = big.reshape(-1)[:numel] * (hvd.rank() + 1)
            handle = hvd.allreduce_async(tensor, op=hvd.Sum, name=f"{numel}.{step}")
            result = hvd.synchronize(handle) * 2
            assert result.eq(2 * total).all(), (numel, step)
        assert result.device == device
print("rank", hvd.rank(), "done", flush=True)
hvd.shutdown()
"""


@pytest.mark.parametrize("launch", [TORCH, MPI], ids=str)
def test_horovods_operations_come_in_order_with_their_stream(tmp_path, launch):
    file = tmp_path / "script.py"
    file.write_text(HOROVOD_SCRIPT)
    ended = run(launch.argv(GPUS, str(file)))
    assert ended.code == 0, ended.output
    assert ended.output.count("done") == GPUS
