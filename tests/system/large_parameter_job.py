"""A parameter of more than 2^31 elements: copied from rank 0, summed over the ranks, trained. Arguments: what is to be done."""

import json
import sys

import torch
from torch import nn

import hvdtrain

ELEMENTS = 2**31 + 8
PLACES = (0, 2**30, 2**31 - 1, 2**31, ELEMENTS - 1)  # before, at and behind where 32 bits end


class Wide(nn.Module):
    def __init__(self, dtype: torch.dtype, value: int, *, trained: bool) -> None:
        super().__init__()
        weight = torch.zeros(ELEMENTS, dtype=dtype)
        weight[list(PLACES)] = value
        self.weight = nn.Parameter(weight, requires_grad=trained)
        self.scale = nn.Parameter(torch.ones(5))

    def forward(self) -> torch.Tensor:
        return (self.weight[list(PLACES)].float() * self.scale * torch.arange(1.0, 6.0)).sum()


def summed(backend: hvdtrain.Backend) -> list[float]:
    """A tensor that all ranks add up."""
    tensor = torch.zeros(ELEMENTS, dtype=torch.uint8)
    tensor[list(PLACES)] = torch.arange(1, 6, dtype=torch.uint8) * (backend.rank + 1)
    return backend.all_reduce_(tensor)[list(PLACES)].tolist()


def frozen(backend: hvdtrain.Backend) -> list[float]:
    """A parameter that rank 0 gives to all, beside one that is trained."""
    model = Wide(torch.uint8, 3 + backend.rank, trained=False)
    replica = backend.replicate(model, torch.optim.SGD([model.scale], lr=0.1))
    replica.backward(replica.model(), samples=1)
    replica.step()
    return [*model.weight[list(PLACES)].tolist(), *model.scale.tolist()]


def trained(backend: hvdtrain.Backend) -> list[float]:
    """A parameter whose gradient all ranks average."""
    model = Wide(torch.bfloat16, 8, trained=True)
    replica = backend.replicate(model, torch.optim.SGD([model.weight], lr=1.0, foreach=False))
    replica.backward(replica.model() * (1 + 2 * backend.rank), samples=1)  # on average, its world size
    replica.step()
    return model.weight[list(PLACES)].tolist()


if __name__ == "__main__":
    with hvdtrain.init(device="cpu", timeout_s=500) as running:
        found = {name: globals()[name](running) for name in sys.argv[1:]}
        everyone = running.all_gather_object(found)
        if running.rank == 0:
            print(json.dumps(everyone))
