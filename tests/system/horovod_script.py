"""A script as people have it: Horovod's usual pattern, in functions. Prints what it ends with."""

import argparse

import horovod.torch as hvd
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=2)
parser.add_argument("--clip", type=float, default=0.5)
args = parser.parse_args()


def train(model, optimizer, loader, sampler, epoch):
    """One epoch."""
    model.train()
    sampler.set_epoch(epoch)
    for x, y in loader:
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        optimizer.synchronize()
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        with optimizer.skip_synchronize():
            optimizer.step()


def evaluate(model, x, y):
    loss = hvd.allreduce(F.mse_loss(model(x), y).detach(), name="loss")
    worst = hvd.allreduce((model(x) - y).detach().abs().max(), op=hvd.Max)
    return loss.item(), worst.item()


def main():
    hvd.init()
    torch.manual_seed(3 + hvd.rank())
    if torch.cuda.is_available():
        torch.cuda.set_device(hvd.local_rank())
    made = torch.Generator().manual_seed(0)
    x = torch.randn(48, 6, generator=made, dtype=torch.float64)
    y = torch.randn(48, 2, generator=made, dtype=torch.float64)
    data = TensorDataset(x, y)
    sampler = DistributedSampler(data, num_replicas=hvd.size(), rank=hvd.rank(), shuffle=False)
    loader = DataLoader(data, batch_size=24 // hvd.size(), sampler=sampler)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters())
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    for epoch in range(args.epochs):
        train(model, optimizer, loader, sampler, epoch)
        loss, worst = evaluate(model, x, y)
        if hvd.rank() == 0:
            print(f"epoch {epoch} loss {loss!r} worst {worst!r}", flush=True)


if __name__ == "__main__":
    main()
