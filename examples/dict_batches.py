"""Samples that are dictionaries with texts of unequal lengths, and a `collate` that pads them; losses are means over tokens.

python examples/dict_batches.py
torchrun --nproc-per-node 2 examples/dict_batches.py
mpirun -np 2 python examples/dict_batches.py
"""

import torch
from torch import nn

import hvdtrain

IGNORED = -100


class Alphabet:
    """Rows of letters, each the one after the letter before it."""

    def __len__(self):
        return 200

    def __getitem__(self, i):
        length = 3 + i % 7
        letters = (torch.arange(length + 1) + i) % 26
        return {"letters": letters[:-1], "next": letters[1:], "name": f"row {i}"}


def collate(samples):
    padded = {
        "letters": nn.utils.rnn.pad_sequence([sample["letters"] for sample in samples], batch_first=True),
        "next": nn.utils.rnn.pad_sequence([s["next"] for s in samples], batch_first=True, padding_value=IGNORED),
    }
    return {**padded, "name": [sample["name"] for sample in samples]}


class NextLetter:
    def loss(self, model, batch):
        return nn.functional.cross_entropy(model(batch["letters"]).flatten(0, 1), batch["next"].flatten())

    def weight_of(self, batch):  # what the loss is a mean over: letters, not rows
        return (batch["next"] != IGNORED).sum()

    def metrics(self, model, batch):
        counted = batch["next"] != IGNORED
        right = (model(batch["letters"]).argmax(-1) == batch["next"]) & counted
        return {"loss": self.loss(model, batch), "accuracy": right.sum() / counted.sum()}


def main():
    torch.manual_seed(0)
    with hvdtrain.init() as backend:
        model = nn.Sequential(nn.Embedding(26, 32), nn.Linear(32, 26)).double().to(backend.device)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        trainer = hvdtrain.Trainer(backend, model, optimizer, task=NextLetter(), collate=collate, precision="fp64")
        result = trainer.fit(Alphabet(), Alphabet(), epochs=4, global_batch_size=30)
        if backend.rank == 0:
            found = result.eval_metrics
            print(f"{backend.world_size} rank(s): loss {found['loss']:.6f}, accuracy {found['accuracy']:.3f}")


if __name__ == "__main__":
    main()
