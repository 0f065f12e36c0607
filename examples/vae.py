"""A variational autoencoder: the loss calls the model's methods, and never its forward pass.

python examples/vae.py
torchrun --nproc-per-node 2 examples/vae.py
horovodrun -np 2 python examples/vae.py
"""

import torch
from torch import nn

import hvdtrain
from hvdtrain.data.digits import digits


class Autoencoder(nn.Module):
    def __init__(self, latent=8):
        super().__init__()
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2 * latent))
        self.decoder = nn.Sequential(nn.Linear(latent, 64), nn.ReLU(), nn.Linear(64, 64))

    def encode(self, x):
        return self.encoder(x).chunk(2, dim=1)

    def decode(self, z):
        return self.decoder(z)


class Reconstruct:
    """The bound of Kingma and Welling, Auto-Encoding Variational Bayes (2013), in nats an image."""

    def bound(self, model, x, *, draw):
        mean, log_variance = model.encode(x)
        z = mean + torch.randn_like(mean) * (0.5 * log_variance).exp() if draw else mean
        pixels = nn.functional.binary_cross_entropy_with_logits(model.decode(z), x.flatten(1), reduction="none").sum(1)
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1)
        return (pixels + divergence).mean()

    def loss(self, model, batch):
        return self.bound(model, batch[0], draw=True)  # each rank draws numbers of its own while `fit` trains

    def metrics(self, model, batch):
        return {"loss": self.bound(model, batch[0], draw=False)}


def main():
    torch.manual_seed(0)
    with hvdtrain.init() as backend:
        model = Autoencoder().to(backend.device)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
        trainer = hvdtrain.Trainer(backend, model, optimizer, task=Reconstruct())
        before = trainer.evaluate(digits(train=False))["loss"]
        after = trainer.fit(digits(train=True), digits(train=False), epochs=15, global_batch_size=64).eval_metrics[
            "loss"
        ]
        if backend.rank == 0:
            print(f"{backend.world_size} rank(s): from {before:.1f} to {after:.1f} nats an image")


if __name__ == "__main__":
    main()
