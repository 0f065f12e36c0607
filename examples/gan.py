"""Two networks against each other: a generator learns a ring of points from a critic that learns to tell them apart.

python examples/gan.py
torchrun --nproc-per-node 2 examples/gan.py
"""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

import hvdtrain
from hvdtrain.data.arrays import ArrayDataset


def ring(points: int) -> Tensor:
    angle = 2 * math.pi * torch.rand(points, dtype=torch.float64)
    return torch.stack([angle.cos(), angle.sin()], dim=1)


def network(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(inputs, 64), nn.LeakyReLU(0.2), nn.Linear(64, 64), nn.LeakyReLU(0.2), nn.Linear(64, outputs)
    ).double()


def main() -> None:
    torch.manual_seed(0)
    generator, critic = network(2, 2), network(2, 1)
    data = ArrayDataset(ring(2000), torch.randn(2000, 2, dtype=torch.float64))  # points, and noise to make points of
    with hvdtrain.init() as backend:
        generator.to(backend.device)
        critic.to(backend.device)
        makes = backend.replicate(generator, torch.optim.Adam(generator.parameters(), lr=1e-3, betas=(0.5, 0.9)))
        judges = backend.replicate(critic, torch.optim.Adam(critic.parameters(), lr=1e-3, betas=(0.5, 0.9)))
        loader = backend.loader(data, global_batch_size=100, shuffle=True)
        for epoch in range(20):
            for real, noise in loader:
                made = generator(noise)
                loss = softplus(-critic(real)).mean() + softplus(critic(made.detach())).mean()
                judges.backward(loss, samples=len(real))
                judges.step()
                critic.requires_grad_(False)  # the generator's loss reaches the critic, and must not train it
                deceived = softplus(-critic(made)).mean()
                makes.backward(deceived, samples=len(real))
                makes.step()
                critic.requires_grad_(True)
            if backend.rank == 0 and epoch % 5 == 4:
                print(
                    f"epoch {epoch + 1}: critic {loss.item():.3f}, generator {deceived.item():.3f} (rank 0's last batch)"
                )
        with torch.no_grad():
            radius = generator(data.tensors[1].to(backend.device)).norm(dim=1)
        if backend.rank == 0:
            print(
                f"{backend.world_size} rank(s): distance from the centre {radius.mean():.6f}, off by {radius.std():.6f}"
            )


if __name__ == "__main__":
    main()
