"""One process, the whole loop.

python examples/one_process.py
"""

import torch
from torch.nn.functional import cross_entropy

import hvdtrain
from hvdtrain.data.digits import digits
from hvdtrain.training.models import cnn


def main() -> None:
    torch.manual_seed(0)
    with hvdtrain.init("local") as backend:
        model = cnn().to(backend.device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        trainer = hvdtrain.Trainer(backend, model, optimizer, loss=cross_entropy, clip_norm=1.0)
        result = trainer.fit(digits(train=True), digits(train=False), epochs=5, global_batch_size=60)
        print(f"{result.steps} steps, accuracy {result.eval_metrics['accuracy']:.3f}")


if __name__ == "__main__":
    main()
