"""Sparse gradients: whose they are, which every rank must know beforehand, and how they are summed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hvdtrain.errors import TrainingError

if TYPE_CHECKING:
    from hvdtrain.backends.communicator import Communicator


def sparse_parameters(module: nn.Module) -> set[int]:
    """Ids of the parameters whose gradients are sparse; known beforehand, so that a rank without a gradient knows it too."""
    sparse, others = _held(module)
    return set(sparse) - others


def dense_embeddings(module: nn.Module) -> list[Tensor]:
    """Weights of sparse embeddings that another part uses as well: their gradients are dense, as a sum is."""
    sparse, others = _held(module)
    return [parameter for key, parameter in sparse.items() if key in others]


def _held(module: nn.Module) -> tuple[dict[int, Tensor], set[int]]:
    """The weights of sparse embeddings, and the ids of all that other modules hold."""
    sparse: dict[int, Tensor] = {}
    others: set[int] = set()
    for part in module.modules():
        if isinstance(part, (nn.Embedding, nn.EmbeddingBag)) and part.sparse:
            sparse[id(part.weight)] = part.weight
        else:
            others.update(map(id, part.parameters(recurse=False)))
    return sparse, others


def unexpected(whose: str) -> TrainingError:
    """The error for a sparse gradient that only the rank knows of that made it."""
    return TrainingError(
        f"the gradient of {whose} is sparse, which only nn.Embedding and nn.EmbeddingBag with sparse=True may have, and no weight that "
        "another part shares: other ranks could not know. Use sparse=False"
    )


def empty_sparse(parameter: nn.Parameter) -> Tensor:
    """A sparse gradient without a row."""
    return torch.sparse_coo_tensor(
        torch.empty((1, 0), dtype=torch.int64, device=parameter.device),
        parameter.new_empty((0, *parameter.shape[1:])),
        parameter.shape,
        check_invariants=False,
    )


def sum_sparse(communicator: Communicator, parameter: nn.Parameter) -> Tensor:
    """Sum a sparse gradient over the ranks, some of which may have none."""
    grad = parameter.grad
    if grad is None:
        grad = empty_sparse(parameter)
    if not grad.is_sparse:
        grad = grad.to_sparse(1)
    grad = grad.coalesce()
    indices = torch.cat(communicator.all_gather(grad.indices().t().contiguous())).t()
    values = torch.cat(communicator.all_gather(grad.values()))
    return torch.sparse_coo_tensor(indices, values, parameter.shape, check_invariants=False).coalesce()
