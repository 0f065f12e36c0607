"""`hvdtrain.spawn` in the place of a launcher: ``python spawn_job.py RANKS -m hvdtrain --backend B FLAGS``."""

import sys
from pathlib import Path

import torch
from slow_task import Slow

import hvdtrain
from hvdtrain.observe.jsonl import JsonlLogger
from hvdtrain.settings.config import TrainConfig
from hvdtrain.settings.flags import build, read_flags
from hvdtrain.training.stopping import StopRequest


def train(backend, run_dir):
    """What the command line does on a backend that runs already, in so far as it matters here."""
    run_dir = Path(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    task = Slow()
    model = task.build_model()
    with StopRequest() as stop:
        hvdtrain.Trainer(
            backend,
            model,
            torch.optim.SGD(model.parameters(), lr=0.01),
            task=task,
            checkpoints=hvdtrain.Checkpoints(run_dir / "checkpoints", keep=2),
            stop_requested=stop,
            log_every=1,
            logger=JsonlLogger(run_dir / "metrics.jsonl", 0) if backend.rank == 0 else None,
        ).fit(task.train_data(), epochs=10000, batch_size=4)


if __name__ == "__main__":
    config = build(TrainConfig, read_flags(TrainConfig, sys.argv[4:]))
    hvdtrain.spawn(train, int(sys.argv[1]), config.backend, (str(config.run_dir),), device="cpu")
