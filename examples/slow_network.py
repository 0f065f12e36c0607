"""Less to send: compressed gradients, or weights that are averaged now and then (DiLoCo), beside plain training.

torchrun --nproc-per-node 2 examples/slow_network.py
mpirun -np 2 python examples/slow_network.py
"""

import torch
from torch import nn

import hvdtrain
from hvdtrain.data.digits import digits

WAYS = {
    "plain": {},
    "int8": {"compression": "int8"},
    "powersgd:2": {"compression": "powersgd:2"},
    "local-sgd:8": {"sync": "local-sgd:8"},
    "diloco:20": {"sync": "diloco:20"},
}


def main():
    train, test = digits(train=True), digits(train=False)
    with hvdtrain.init() as backend:
        for way, options in WAYS.items():
            torch.manual_seed(0)
            model = nn.Sequential(nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10)).to(backend.device)
            optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
            trainer = hvdtrain.Trainer(backend, model, optimizer, loss=nn.functional.cross_entropy, **options)
            result = trainer.fit(train, test, epochs=5, global_batch_size=64)
            if backend.rank == 0:
                accuracy = result.eval_metrics["accuracy"]
                print(
                    f"{backend.world_size} rank(s): {way} sends {result.sent_bytes_per_step:,.0f} bytes a step, accuracy {accuracy:.3f}"
                )


if __name__ == "__main__":
    main()
