"""Start ranks from a script or a notebook, without a launcher.

python examples/spawn_from_script.py
"""

import torch

import hvdtrain


def work(backend: hvdtrain.Backend, factor: float) -> float:
    return float(backend.all_reduce(torch.tensor(factor * backend.rank)))


if __name__ == "__main__":
    print(hvdtrain.spawn(work, nprocs=3, backend="torch", args=(10.0,), device="cpu"))  # 0 + 10 + 20 on each rank
