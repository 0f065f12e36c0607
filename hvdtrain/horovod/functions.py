"""What scripts copy from one rank to the others before they train, and objects of any kind."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Callable, Iterable, Mapping
from types import SimpleNamespace
from typing import Any

import cloudpickle
import torch
from torch import Tensor
from torch.optim import Optimizer

from hvdtrain.backends.agreement import copy_optimizer
from hvdtrain.backends.forms import pickled, unpickled
from hvdtrain.horovod import state
from hvdtrain.horovod.handles import synchronize
from hvdtrain.horovod.operations import broadcast_async_, check_root, start
from hvdtrain.horovod.passing_through import by_engine
from hvdtrain.horovod.process_sets import ProcessSet, global_process_set
from hvdtrain.horovod.state import real


def broadcast_parameters(
    params: Mapping[str, Tensor] | Iterable[Tensor | tuple[str | None, Tensor]], root_rank: int
) -> None:
    """Overwrite tensors with those of the root: a model's ``state_dict()``, ``named_parameters()`` or ``parameters()``.

    Args:
        params: A dictionary, tensors, or pairs of a name and a tensor.
        root_rank: The rank to copy from.

    Raises:
        ValueError: Something else was given.
        HorovodInternalError: A tensor is not alike on all ranks; names it and who has what.
    """
    if isinstance(params, Mapping):
        pairs: list[tuple[str | None, Any]] = sorted(params.items())
    elif isinstance(params, Iterable) and not isinstance(params, Tensor):
        pairs = [each if isinstance(each, tuple) else (None, each) for each in params]
    else:
        raise ValueError(f"hvd.broadcast_parameters takes tensors or a state_dict, got {type(params).__name__}")
    for name, tensor in pairs:
        if not isinstance(tensor, Tensor):
            raise ValueError(
                f"hvd.broadcast_parameters copies tensors, and {name!r} is a {type(tensor).__name__}; leave it out, and copy it "
                "with hvd.broadcast_object"
            )
    for handle in [broadcast_async_(tensor, root_rank, name) for name, tensor in pairs]:
        synchronize(handle)


def broadcast_optimizer_state(optimizer: Optimizer, root_rank: int, model: Any = None) -> None:
    """Overwrite an optimizer's settings and state with those of the root.

    The optimizer is not stepped: where the root has no state yet, no rank has any afterwards, and no weight moves.
    Parameters of an optimizer without state get a gradient of zeros, as with Horovod.

    Args:
        optimizer: Of the same class, over the same parameters on every rank; any class, LBFGS too.
        root_rank: The rank to copy from.
        model: Accepted for Horovod's sake.
    """
    if not optimizer.state:
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
    copy_optimizer(_FromRoot(root_rank), optimizer)


class _FromRoot:
    """Broadcasts as `copy_optimizer` wants them, from any rank; named, because Horovod would name an object by its type."""

    def __init__(self, root_rank: int) -> None:
        self._root_rank = root_rank
        self._numbers = itertools.count()
        self.wire = SimpleNamespace(rank=0 if state.rank() == root_rank else 1)

    def broadcast_object(self, obj: Any) -> Any:
        return broadcast_object(obj, self._root_rank, name="optimizer's outline")

    def broadcast(self, tensor: Tensor) -> Tensor:
        copied: Tensor = synchronize(
            broadcast_async_(tensor.clone(), self._root_rank, f"optimizer's state {next(self._numbers)}")
        )
        return copied


class _ByValue:
    """Travels as what it holds, with functions and classes that only this program's main file has."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def __reduce__(self) -> tuple[Callable[[bytes], Any], tuple[bytes]]:
        return pickle.loads, (cloudpickle.dumps(self._value),)


@by_engine(real)
def broadcast_object(
    obj: Any, root_rank: int = 0, name: str | None = None, process_set: ProcessSet = global_process_set
) -> Any:
    """Give every rank a copy of the root's object.

    Args:
        obj: Anything that cloudpickle takes; that of other ranks does not count.
        root_rank: The rank to copy from, a rank of the world.
        name: By which the ranks' calls are matched; calls without one by their number.
        process_set: The ranks that take part.

    Returns:
        The root's object; on the root ``obj`` itself.
    """
    state.controller_of(process_set, "hvd.broadcast_object")
    check_root(root_rank, process_set, "broadcast_object")
    key, is_root = state.job().backend.key, state.rank() == root_rank
    data = pickled(_ByValue(obj), key) if is_root else torch.empty(0, dtype=torch.uint8, device="cpu")
    received = synchronize(
        start("broadcast_object", [data], name, process_set, waited_for=True, alike=False, root_rank=root_rank)
    )
    return obj if is_root else unpickled(received, key)


@by_engine(real)
def allgather_object(obj: Any, name: str | None = None) -> list[Any]:
    """Collect every rank's object on every rank, in rank order.

    Args:
        obj: Anything that cloudpickle takes.
        name: As for `broadcast_object`.
    """
    key = state.job().backend.key
    data = pickled(_ByValue(obj), key)
    gathered = synchronize(start("allgather_object", [data], name, global_process_set, waited_for=True, alike=False))
    return [unpickled(data, key) for data in gathered]
