"""Data without a length: lines of text files, read as they come, and shards that Hugging Face-like streams divide themselves.

python examples/streams.py
torchrun --nproc-per-node 2 examples/streams.py
mpirun -np 2 python examples/streams.py
"""

import tempfile
from pathlib import Path

import torch
from torch import nn

import hvdtrain


class Lines:
    """The letters of text files, and the letter after each; every rank reads all and keeps its own of every batch."""

    def __init__(self, files):
        self.files = files

    def __iter__(self):
        for file in self.files:
            for line in file.read_text().splitlines():
                letters = torch.tensor([ord(letter) - ord("a") for letter in line])
                yield letters[:-1], letters[1:]


def write_texts(folder):
    for number in range(3):
        rows = ["".join(chr(ord("a") + (number * 7 + row + at) % 26) for at in range(9)) for row in range(40)]
        (folder / f"{number}.txt").write_text("\n".join(rows))


def loss(outputs, following):
    return nn.functional.cross_entropy(outputs.flatten(0, 1), following.flatten())


def main():
    torch.manual_seed(0)
    with hvdtrain.init() as backend, tempfile.TemporaryDirectory() as folder:
        write_texts(Path(folder))  # each rank its own copy of the same
        lines = Lines(sorted(Path(folder).iterdir()))
        model = nn.Sequential(nn.Embedding(26, 16), nn.Linear(16, 26)).double().to(backend.device)
        trainer = hvdtrain.Trainer(
            backend, model, torch.optim.Adam(model.parameters(), lr=0.05), loss=loss, precision="fp64"
        )
        result = trainer.fit(lines, epochs=6, global_batch_size=16)
        if backend.rank == 0:
            print(
                f"{backend.world_size} rank(s): {result.steps} steps, {result.samples} lines, loss {result.train_loss:.6f}"
            )


if __name__ == "__main__":
    main()
