"""One process that splits each batch over all GPUs with nn.DataParallel; without a GPU it trains on the CPU and says so.

python examples/data_parallel.py
"""

import logging

import torch
from torch.nn.functional import cross_entropy

import hvdtrain
from hvdtrain.data.digits import digits
from hvdtrain.training.models import cnn


def main() -> None:
    logging.basicConfig(level=logging.WARNING)
    torch.manual_seed(0)
    with hvdtrain.init("local", data_parallel=True) as backend:
        model = cnn().to(backend.device)
        trainer = hvdtrain.Trainer(backend, model, torch.optim.AdamW(model.parameters(), lr=3e-3), loss=cross_entropy)
        result = trainer.fit(digits(train=True), digits(train=False), epochs=3, global_batch_size=60)
        print(f"{torch.cuda.device_count()} GPU(s): accuracy {result.eval_metrics['accuracy']:.3f}")


if __name__ == "__main__":
    main()
