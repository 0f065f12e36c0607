"""A deep model whose activations are computed again in the backward pass instead of being kept.

python examples/less_memory.py
torchrun --nproc-per-node 2 examples/less_memory.py
mpirun -np 2 python examples/less_memory.py
"""

import torch
from torch import nn

import hvdtrain


class Deep(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(24))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


def kept_bytes(model, x):
    """What a forward pass keeps for the backward pass."""
    kept = {}

    def keep(tensor):
        kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(x)
    return sum(kept.values())


def main():
    with hvdtrain.init() as backend:
        found = []
        for pattern in (None, r"layers[.]\d+"):
            torch.manual_seed(0)
            model = Deep().double().to(backend.device)
            x, y = torch.randn(2, 96, 64, dtype=torch.float64)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
            trainer = hvdtrain.Trainer(
                backend, model, optimizer, loss=nn.functional.mse_loss, checkpoint_modules=pattern, precision="fp64"
            )
            result = trainer.fit(torch.utils.data.TensorDataset(x, y), epochs=3, global_batch_size=24)
            found.append((kept_bytes(model, x.to(backend.device)), result.train_loss))
        (kept, loss), (less, same) = found
        if backend.rank == 0:
            print(f"{backend.world_size} rank(s): {less / kept:.2f} of the memory, losses {loss:.9f} and {same:.9f}")


if __name__ == "__main__":
    main()
