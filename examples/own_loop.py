"""Your own loop, five changed lines.

python examples/own_loop.py
torchrun --nproc-per-node 2 examples/own_loop.py
"""

import torch
from torch import nn

import hvdtrain
from hvdtrain.data.digits import digits


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    with hvdtrain.init() as backend:  # 1
        model.to(backend.device)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        replica = backend.replicate(model, optimizer)  # 2
        for _ in range(10):
            for x, y in backend.loader(digits(train=True), batch_size=32, shuffle=True):  # 3
                loss = nn.functional.cross_entropy(replica.model(x), y)
                replica.backward(loss, samples=len(x))  # 4
                replica.step(clip_norm=1.0)  # 5
        correct = torch.zeros(2, device=backend.device)
        with torch.no_grad():
            for x, y in backend.loader(digits(train=False), batch_size=90):
                correct += torch.tensor([(model(x).argmax(1) == y).sum(), len(y)], device=backend.device)
        right, all_of_them = backend.all_reduce(correct).tolist()
        if backend.rank == 0:
            print(f"{backend.world_size} rank(s): accuracy {right / all_of_them:.3f} on {all_of_them:.0f} images")


if __name__ == "__main__":
    main()
