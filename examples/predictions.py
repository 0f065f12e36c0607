"""Predictions of all samples on every rank, in the data's order: by the Trainer, and in a loop of one's own.

python examples/predictions.py
torchrun --nproc-per-node 2 examples/predictions.py
mpirun -np 2 python examples/predictions.py
"""

import torch
from torch import nn

import hvdtrain
from hvdtrain.data.digits import digits


def in_order(backend, model, images):
    """Every rank computes each n-th row, and the rows are dealt back; ranks may have unequally many."""
    model.eval()
    with torch.no_grad():
        outputs = model(images[backend.rank :: backend.world_size].to(backend.device)).cpu()
    whole = torch.empty(len(images), *outputs.shape[1:], dtype=outputs.dtype)
    for rank, part in enumerate(backend.all_gather(outputs)):
        whole[rank :: backend.world_size] = part
    return whole


def main():
    torch.manual_seed(0)
    train, test = digits(train=True, dtype=torch.float64), digits(train=False, dtype=torch.float64)
    images, labels = test.tensors
    with hvdtrain.init() as backend:
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)).double().to(backend.device)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        trainer = hvdtrain.Trainer(backend, model, optimizer, loss=nn.functional.cross_entropy, precision="fp64")
        trainer.fit(train, epochs=4, global_batch_size=48)

        outputs = trainer.predict(test, to="all")  # or "rank0", or a folder, where rank 0 writes batch by batch
        own = in_order(backend, model, images)

        sureness, found = outputs.softmax(1).max(1)
        mistakes = (found != labels).nonzero().flatten()
        surest = mistakes[sureness[mistakes].argsort(descending=True)][:5].tolist()
        everywhere = backend.all_gather_object(surest)  # what each rank found, from outputs of its own
        alike = torch.allclose(outputs, own) and everywhere == [surest] * backend.world_size
        if backend.rank == 0:
            right = 1 - len(mistakes) / len(labels)
            print(f"{backend.world_size} rank(s): {right:.4f} are right, surest mistakes {surest}, alike: {alike}")


if __name__ == "__main__":
    main()
