"""torch.distributed over MPI with a stock PyTorch wheel, without anything else of hvdtrain.

mpirun -np 2 python examples/mpi_group.py
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import hvdtrain.mpi  # noqa: F401  (makes the name known)


def main():
    dist.init_process_group("mpi4py")
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    mine = x[dist.get_rank() :: dist.get_world_size()]
    for _ in range(50):
        optimizer.zero_grad()
        loss = (model(mine).squeeze(1) - mine.sum(1)).square().mean()
        loss.backward()
        optimizer.step()
    total = loss.detach().clone()
    dist.all_reduce(total)
    if dist.get_rank() == 0:
        print(f"{dist.get_world_size()} rank(s): loss {total.item() / dist.get_world_size():.2e}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
