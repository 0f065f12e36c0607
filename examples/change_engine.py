"""A run that begins under Horovod and goes on under torchrun, to the same losses: start it again by another launcher.

horovodrun -np 2 python examples/change_engine.py runs/moved --stop-after 40
torchrun --nproc-per-node 2 examples/change_engine.py runs/moved
"""

import argparse
import sys

import torch
from torch import nn

import hvdtrain
from hvdtrain.data.digits import digits


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--stop-after", type=int, metavar="STEPS", help="end there, in the midst of an epoch")
    options = parser.parse_args()
    torch.manual_seed(0)
    with (
        hvdtrain.init() as backend
    ):  # of the launcher: Horovod under horovodrun, torch under torchrun, MPI under mpirun
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 10))
        model.double().to(backend.device)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        checkpoints = hvdtrain.Checkpoints(options.folder, keep=2)
        trainer = hvdtrain.Trainer(
            backend, model, optimizer, loss=nn.functional.cross_entropy, precision="fp64",
            schedule=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=120), checkpoints=checkpoints,
        )  # fmt: skip
        result = trainer.fit(
            digits(train=True, dtype=torch.float64), digits(train=False, dtype=torch.float64), epochs=4,
            max_steps=options.stop_after, global_batch_size=48, resume_from=checkpoints.find(backend),
        )  # fmt: skip
        if backend.rank == 0:
            print(f"backend {backend.name}: at step {result.steps}", file=sys.stderr)
            loss = result.eval_metrics["loss"]
            print(f"{backend.world_size} rank(s): {result.steps} steps, evaluated loss {loss:.12f}")


if __name__ == "__main__":
    main()
