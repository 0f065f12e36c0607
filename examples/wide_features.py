"""100,000 input features, an N-th of their weights on each of N ranks: which words make a text spam?

python examples/wide_features.py
torchrun --nproc-per-node 2 examples/wide_features.py
mpirun -np 2 python examples/wide_features.py
horovodrun -np 2 python examples/wide_features.py

Every rank trains on the same batches, and computes the same loss: what is cut here is the model, not the data.
"""

import torch
from torch import Tensor, nn

import hvdtrain

WORDS, TEXTS, LENGTH = 100_000, 512, 60


def texts(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Texts as sparse counts of words, (TEXTS, WORDS), and which of them are spam; a rare tenth of the words gives it away."""
    words = torch.randint(WORDS, (TEXTS, LENGTH), generator=generator)
    spam = torch.rand(TEXTS, generator=generator) < 0.5
    telling = torch.randint(WORDS // 10, (TEXTS, LENGTH // 4), generator=generator)
    words[spam, : LENGTH // 4] = telling[spam]
    rows = torch.arange(TEXTS).repeat_interleave(LENGTH)
    indices = torch.stack([rows, words.reshape(-1)])
    counts = torch.sparse_coo_tensor(indices, torch.ones(indices.shape[1]), (TEXTS, WORDS), check_invariants=True)
    return counts.coalesce(), spam.float()


def main() -> None:
    hvdtrain.seed_everything(0)  # on every rank alike
    generator = torch.Generator().manual_seed(1)
    with hvdtrain.init() as backend:
        batches = [[part.to(backend.device) for part in texts(generator)] for _ in range(9)]
        wide = hvdtrain.nn.FeaturePartitionedLinear(WORDS, 16, backend=backend)
        model = nn.Sequential(wide, nn.ReLU(), nn.Linear(16, 1), nn.Flatten(0)).to(backend.device)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        criterion = nn.BCEWithLogitsLoss()
        for _ in range(3):
            for counts, spam in batches[:-1]:
                optimizer.zero_grad()
                criterion(model(counts), spam).backward()
                optimizer.step()
        with torch.no_grad():
            counts, spam = batches[-1]
            answers = model(counts)
        loss, right = float(criterion(answers, spam)), float(((answers > 0) == (spam > 0)).float().mean())
        if backend.rank == 0:
            print(f"{wide.weight.numel():,} of {WORDS * 16:,} weights on this rank")
            print(f"{backend.world_size} rank(s): accuracy {right:.3f}, loss {loss:.4f}")


if __name__ == "__main__":
    main()
