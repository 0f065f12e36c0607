"""A learning-rate schedule, micro-batches that add up to one step, and clipped gradients.

python examples/schedule.py
torchrun --nproc-per-node 2 examples/schedule.py
mpirun -np 2 python examples/schedule.py
"""

import torch
from torch import nn

import hvdtrain
from hvdtrain.data.digits import digits

EPOCHS, GLOBAL_BATCH = 4, 48


def main():
    torch.manual_seed(0)
    train, test = digits(train=True, dtype=torch.float64), digits(train=False, dtype=torch.float64)
    with hvdtrain.init() as backend:
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).double().to(backend.device)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        steps = -(-len(train) // GLOBAL_BATCH) * EPOCHS  # optimizer steps, however many micro-batches each has
        trainer = hvdtrain.Trainer(
            backend, model, optimizer, loss=nn.functional.cross_entropy, precision="fp64",
            schedule=torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.3, total_steps=steps),
            accumulate=4,  # micro-batches of a rank in a step
            clip_norm=1.0,  # of the whole step's averaged gradient
        )  # fmt: skip
        result = trainer.fit(train, test, epochs=EPOCHS, global_batch_size=GLOBAL_BATCH)
        if backend.rank == 0:
            rate = optimizer.param_groups[0]["lr"]
            accuracy = result.eval_metrics["accuracy"]
            print(f"{backend.world_size} rank(s): {result.steps} steps, last rate {rate:.1e}, accuracy {accuracy:.4f}")


if __name__ == "__main__":
    main()
