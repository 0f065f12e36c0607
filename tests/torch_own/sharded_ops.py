"""What DTensors make of torch's own samples of its operations (`op_db`, inside its wheel), over one group or another.

    mpirun -np 2 python sharded_ops.py mpi4py OUT.json
    torchrun --nproc-per-node 2 sharded_ops.py gloo OUT.json

For each operation: "right" where each way to lay its arguments over the ranks gave what whole tensors give, "wrong" where one did
not, or the name of the error. Two groups serve DTensors alike if the files are equal.
"""

from __future__ import annotations

import json
import sys
import warnings
from datetime import timedelta
from itertools import islice

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._pytree import tree_leaves

warnings.simplefilter("ignore")
from torch.testing._internal.common_methods_invocations import op_db  # noqa: E402
from torch.testing._internal.distributed._tensor.common_dtensor import DTensorConverter  # noqa: E402

SAMPLES, WAYS = 2, 6
ALONE = ("empty", "new_empty", "rand", "bernoulli", "normal", "dropout", "multinomial", "resize", "exponential", "cauchy", "geometric",
         "uniform", "log_normal", "poisson", "rrelu", "svd_lowrank", "pca_lowrank")  # fmt: skip
"""Names of what gives other numbers each time."""


def tensors(value: object) -> list[Tensor]:
    found = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
    return [leaf.full_tensor() if hasattr(leaf, "full_tensor") else leaf for leaf in found]


def became(op, mesh: DeviceMesh) -> str:
    for sample in islice(op.sample_inputs("cpu", torch.float64, requires_grad=False), SAMPLES):
        args, kwargs = (sample.input, *sample.args), sample.kwargs
        try:
            expected = tensors(op.op(*args, **kwargs))
        except Exception as error:
            return f"whole: {type(error).__name__}"
        for laid, named in islice(DTensorConverter(mesh, args, kwargs), WAYS):
            try:
                found = tensors(op.op(*laid, **named))
            except Exception as error:
                return type(error).__name__
            for one, other in zip(found, expected, strict=True):
                if one.shape != other.shape or not torch.allclose(one, other, rtol=1e-9, atol=1e-9, equal_nan=True):
                    return "wrong"
    return "right"


def main() -> None:
    group, out = sys.argv[1:3]
    if group == "mpi4py":
        import hvdtrain.mpi  # noqa: F401
    dist.init_process_group(group, timeout=timedelta(seconds=60))
    mesh = DeviceMesh("cpu", list(range(dist.get_world_size())))
    outcomes: dict[str, str] = {}
    for op in op_db:
        name = f"{op.name}/{op.variant_test_name}"
        if any(word in name for word in ALONE) or torch.float64 not in op.supported_dtypes("cpu"):
            continue
        torch.manual_seed(0)
        mine = became(op, mesh)
        everyone: list[str] = [""] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
        outcomes[name] = mine if len(set(everyone)) == 1 else " / ".join(everyone)
        if dist.get_rank() == 0:
            with open(out, "w") as file:
                json.dump(outcomes, file, indent=1)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
