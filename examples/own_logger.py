"""A logger of your own: what the loop reports, as a CSV file.

python examples/own_logger.py runs/losses.csv
torchrun --nproc-per-node 2 examples/own_logger.py runs/losses.csv
mpirun -np 2 python examples/own_logger.py runs/losses.csv
"""

import csv
import sys
from pathlib import Path

import torch
from torch import nn

import hvdtrain
from hvdtrain.data.digits import digits


class CsvLogger:
    """A line for each logged step and each evaluation; of `hvdtrain.Logger`'s form."""

    def __init__(self, file):
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        self.file = Path(file).open("w", newline="")  # noqa: SIM115  (closed by close)
        self.lines = csv.writer(self.file)
        self.lines.writerow(["kind", "step", "loss", "learning rate"])

    def log_step(self, record):
        self.lines.writerow(["train", record.step, record.loss, record.lr])

    def log_eval(self, record):
        self.lines.writerow(["eval", record.step, record.metrics["loss"], ""])
        self.file.flush()

    def close(self):
        self.file.close()


def main():
    torch.manual_seed(0)
    with hvdtrain.init() as backend:
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).double().to(backend.device)
        trainer = hvdtrain.Trainer(
            backend, model, torch.optim.SGD(model.parameters(), lr=0.1), loss=nn.functional.cross_entropy,
            precision="fp64", log_every=5, logger=CsvLogger(sys.argv[1]) if backend.rank == 0 else None,
        )  # fmt: skip
        trainer.fit(
            digits(train=True, dtype=torch.float64), digits(train=False, dtype=torch.float64),
            epochs=3, global_batch_size=48,
        )  # fmt: skip
        if backend.rank == 0:
            lines = list(csv.DictReader(Path(sys.argv[1]).read_text().splitlines()))
            losses = ", ".join(f"{float(line['loss']):.6f}" for line in lines if line["kind"] == "eval")
            print(f"{backend.world_size} rank(s): {len(lines)} lines, evaluated losses {losses}")


if __name__ == "__main__":
    main()
