"""Contrastive learning with the negatives of all ranks: which lower half of a digit belongs to which upper half?

python examples/contrastive.py
torchrun --nproc-per-node 2 examples/contrastive.py
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

import hvdtrain
from hvdtrain.backends.base import Backend
from hvdtrain.data.digits import digits


class Halves(nn.Module):
    """Embeds the upper and the lower half of images, each by a network of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.upper, self.lower = (
            nn.Sequential(nn.Flatten(), nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 32)) for _ in range(2)
        )

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        images = images.double()
        return normalize(self.upper(images[:, :, :4])), normalize(self.lower(images[:, :, 4:]))


def contrast(backend: Backend, upper: Tensor, lower: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of this rank's upper halves among the lower halves of all ranks, and how many are right."""
    everyone = backend.all_gather(lower)  # with gradients; ranks may have different numbers
    before = sum(len(part) for part in everyone[: backend.rank])
    belongs = before + torch.arange(len(upper), device=upper.device)
    likeness = upper @ torch.cat(everyone).T / 0.1
    return cross_entropy(likeness, belongs), (likeness.argmax(1) == belongs).sum()


def main() -> None:
    torch.manual_seed(0)
    model = Halves().double()
    with hvdtrain.init() as backend:
        model.to(backend.device)
        replica = backend.replicate(model, torch.optim.Adam(model.parameters(), lr=2e-3))
        train = backend.loader(digits(train=True), global_batch_size=120, shuffle=True)
        for _ in range(15):
            for images, _ in train:
                loss, _ = contrast(backend, *model(images))
                replica.backward(loss, samples=len(images))
                replica.step()
        right = torch.zeros(2, dtype=torch.float64, device=backend.device)
        with torch.no_grad():
            for images, _ in backend.loader(digits(train=False), global_batch_size=90):
                loss, found = contrast(backend, *model(images))
                right += torch.stack([loss * len(images), found]) if len(images) else 0
        loss_sum, found_sum = backend.all_reduce(right).tolist()
        images_in_all = len(digits(train=False))
        if backend.rank == 0:
            print(
                f"{backend.world_size} rank(s): loss {loss_sum / images_in_all:.6f}, "
                f"{found_sum / images_in_all:.3f} of the halves found among 90"
            )


if __name__ == "__main__":
    main()
