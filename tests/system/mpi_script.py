"""A plain torch script over the mpi4py group: `mpirun -np 3 python tests/system/mpi_script.py FOLDER`. No hvdtrain but its import."""

import sys
import warnings

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

import hvdtrain.mpi  # noqa: F401


def model_of(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).double()


def batch(rank, count=4):
    x = torch.sin(torch.arange(rank * 100, rank * 100 + count * 6, dtype=torch.float64)).reshape(count, 6)
    return x, x[:, :3].square()


def same_everywhere(model):
    flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    everyone = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, flat)
    assert all(torch.equal(other, everyone[0]) for other in everyone)
    return flat


def trained(rank, size):
    """DDP with no_sync, against one process on the whole batch."""
    ddp = DistributedDataParallel(model_of(rank))  # rank 0's weights count
    alone = model_of(0)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (ddp, alone)]
    for step in range(3):
        with ddp.no_sync():
            nn.functional.mse_loss(ddp(batch(rank + step)[0]), batch(rank + step)[1]).backward()
        nn.functional.mse_loss(ddp(batch(rank + step + 7)[0]), batch(rank + step + 7)[1]).backward()
        for other in range(size):
            for shift in (0, 7):
                x, y = batch(other + step + shift)
                (nn.functional.mse_loss(alone(x), y) / size).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    flat = same_everywhere(ddp.module)
    torch.testing.assert_close(
        flat, torch.cat([p.detach().reshape(-1) for p in alone.parameters()]), rtol=1e-12, atol=1e-14
    )


def compressed(rank):
    """PowerSGD: futures of the group, chained."""
    ddp = DistributedDataParallel(model_of(0).float())
    state = powerSGD_hook.PowerSGDState(process_group=None, matrix_approximation_rank=2, start_powerSGD_iter=2)
    ddp.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.05)
    losses = []
    for _ in range(30):
        x, y = batch(rank)
        loss = nn.functional.mse_loss(ddp(x.float()), y.float())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    same_everywhere(ddp.module)
    assert losses[-1] < losses[0]


def uneven(rank, size):
    """Join: ranks with different numbers of batches."""
    ddp = DistributedDataParallel(model_of(0))
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    with Join([ddp]):
        for step in range(rank + 1):
            x, y = batch(rank + step)
            nn.functional.mse_loss(ddp(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    same_everywhere(ddp.module)


def checkpointed(rank, folder):
    """torch.distributed.checkpoint: saved by all ranks, loaded into other values."""
    model = model_of(0)
    own = {"model": model.state_dict(), "own": torch.full((2,), float(rank))}
    dcp.save({**own["model"], f"rank{rank}": own["own"]}, checkpoint_id=folder)
    target = model_of(1)
    state = {**target.state_dict(), f"rank{rank}": torch.zeros(2)}
    dcp.load(state, checkpoint_id=folder)
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert state[f"rank{rank}"].tolist() == [float(rank)] * 2


def main():
    warnings.simplefilter("ignore", FutureWarning)
    dist.init_process_group("mpi4py")
    rank, size = dist.get_rank(), dist.get_world_size()
    trained(rank, size)
    compressed(rank)
    uneven(rank, size)
    checkpointed(rank, sys.argv[1])
    dist.barrier()
    dist.destroy_process_group()
    print(f"rank {rank} of {size} done", flush=True)


if __name__ == "__main__":
    main()
