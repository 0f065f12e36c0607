"""Averaged weights, an early end, and the best checkpoint, from which predictions are then made.

python examples/best_of_a_run.py runs/best
torchrun --nproc-per-node 2 examples/best_of_a_run.py runs/best
mpirun -np 2 python examples/best_of_a_run.py runs/best
"""

import sys

import torch
from torch import nn

import hvdtrain
from hvdtrain.data.digits import digits


def main():
    torch.manual_seed(0)
    with hvdtrain.init() as backend:
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).double().to(backend.device)
        best = hvdtrain.BestCheckpoint(f"{sys.argv[1]}/best", "accuracy", mode="max")
        callbacks = [
            hvdtrain.ExponentialMovingAverage(0.98),  # evaluations and predictions are the average's
            hvdtrain.EarlyStopping("accuracy", mode="max", patience=2),
            best,
        ]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        trainer = hvdtrain.Trainer(
            backend, model, optimizer, loss=nn.functional.cross_entropy, precision="fp64", callbacks=callbacks,
            checkpoints=hvdtrain.Checkpoints(f"{sys.argv[1]}/checkpoints", keep=2),
        )  # fmt: skip
        test = digits(train=False, dtype=torch.float64)
        result = trainer.fit(digits(train=True, dtype=torch.float64), test, epochs=40, global_batch_size=64)
        found = best.checkpoints.find(backend)
        # Back to the best: this loads and evaluates it, and trains nothing.
        again = trainer.fit(
            digits(train=True, dtype=torch.float64), test, epochs=0, global_batch_size=64, resume_from=found
        )
        outputs = trainer.predict(test)  # of all samples, in the data's order, on rank 0
        if backend.rank == 0:
            right = (outputs.argmax(1) == torch.tensor([int(y) for _, y in test])).double().mean()
            print(f"ended after {result.epochs} epochs: {result.stopped}", file=sys.stderr)
            print(
                f"{backend.world_size} rank(s): best {again.eval_metrics['accuracy']:.4f}, of its predictions {right:.4f} right"
            )


if __name__ == "__main__":
    main()
