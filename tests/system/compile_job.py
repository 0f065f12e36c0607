"""Trains twice, without and with torch.compile, and says what came of it. Arguments: torch's compiler backend."""

import copy
import json
import sys
import tempfile

import torch
from torch import nn

import hvdtrain
from hvdtrain.data.arrays import ArrayDataset


def made() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.ReLU()) for _ in range(3)]
    return nn.Sequential(*layers, nn.Linear(16, 10)).double()


def trained(backend, folder, **options):
    model, data = made(), ArrayDataset(torch.linspace(-1, 1, 1600).double().reshape(100, 16), torch.arange(100) % 10)
    checkpoints = hvdtrain.Checkpoints(folder)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    trainer = hvdtrain.Trainer(
        backend,
        model,
        optimizer,
        loss=nn.functional.cross_entropy,
        precision="fp64",
        accumulate=2,
        checkpoints=checkpoints,
        **options,
    )
    trainer.fit(data, data, epochs=2, global_batch_size=24, max_steps=7)
    found = checkpoints.find(backend)
    other = made()
    resumed = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9)
    result = hvdtrain.Trainer(
        backend, other, resumed, loss=nn.functional.cross_entropy, precision="fp64", accumulate=2, **options
    ).fit(data, data, epochs=2, global_batch_size=24, resume_from=found)
    return other, result.eval_metrics["loss"]


def difference(model, other):
    return max(
        float((a - b).abs().max())
        for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True)
    )


def main() -> None:
    ways = [
        {},
        {"compile": {"backend": sys.argv[1]}},
        {"compile": {"backend": sys.argv[1]}, "checkpoint_modules": "[01]"},
    ]
    with hvdtrain.init(device="cpu", timeout_s=120) as backend, tempfile.TemporaryDirectory() as temporary:
        folder = backend.broadcast_object(temporary)
        found = [trained(backend, f"{folder}/{number}", **options) for number, options in enumerate(ways)]
        stats, breaks = torch._dynamo.utils.counters["stats"], torch._dynamo.utils.counters["graph_break"]
        twin = copy.deepcopy(found[1][0])
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.zero_()
        said = {
            "differences": [difference(model, found[0][0]) for model, _ in found],
            "losses": [loss for _, loss in found],
            "names": all(list(model.state_dict()) == list(made().state_dict()) for model, _ in found),
            "graphs": stats["unique_graphs"],
            "breaks": len(breaks),
            "own_copy": float(twin(torch.ones(2, 16).double()).abs().max()) == 0,
        }
        everyone = backend.all_gather_object(said)
        if backend.rank == 0:
            print(json.dumps(everyone))
        backend.barrier()


if __name__ == "__main__":
    main()
