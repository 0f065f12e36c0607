"""One rank: count the bytes that a training step sends over eth0, and write them down."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import nn

import hvdtrain

STEPS = 12


def sent() -> int:
    return int(Path("/sys/class/net/eth0/statistics/tx_bytes").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("backend")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--all-reduce", default="auto")
    parser.add_argument("--compression", default="none")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with hvdtrain.init(args.backend, all_reduce=args.all_reduce) as backend:
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(4)), nn.Linear(1024, 10))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        replica = backend.replicate(model, optimizer, compression=args.compression)
        x, y = torch.randn(4, 1024), torch.randint(0, 10, (4,))

        def step() -> None:
            loss = nn.functional.cross_entropy(replica.model(x), y)
            replica.backward(loss, samples=len(x), total=len(x) * backend.world_size)
            replica.step()

        for _ in range(3):
            step()
        backend.barrier()
        before, counted = sent(), backend.traffic.sent_bytes
        for _ in range(STEPS):
            step()
        backend.barrier()
        found = {
            "rank": backend.rank,
            "node": backend.topology.node_rank,
            "gradient_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
            "sent_per_step": (sent() - before) / STEPS,
            "counted_per_step": (backend.traffic.sent_bytes - counted) / STEPS,
        }
        (args.folder / f"{backend.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
