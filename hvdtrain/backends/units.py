"""Which modules of a model are cut over the ranks as one piece, and what cannot be trained so: the same on every engine."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch
from torch import nn

from hvdtrain.errors import ConfigError

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from hvdtrain.backends.replica import ReplicaOptions

_WITH = "shard_modules= does not go with {what}: {why}; {instead}"


def units_of(model: nn.Module, pattern: str) -> dict[str, nn.Module]:
    """Return the modules that are gathered one at a time, by name, inner ones first; the rest of the model is one more.

    Args:
        model: Whole, on every rank.
        pattern: A regular expression; the whole name must match, as in `torch.nn.Module.named_modules`.

    Raises:
        ConfigError: Nothing matches, a match has no forward pass, or a parameter belongs to two units.
    """
    try:
        wanted = re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"shard_modules= is no regular expression: {error} in {pattern!r}") from error
    names = {name: module for name, module in model.named_modules() if name}
    units = {
        name: module
        for name, module in names.items()
        if wanted.fullmatch(name) and any(True for _ in module.parameters())
    }
    if not units:
        some = ", ".join(list(names)[:12])
        raise ConfigError(
            f"no module of {type(model).__name__} with parameters has a name like shard_modules={pattern!r}; there are {some}"
        )
    for name, module in units.items():
        if type(module).forward is nn.Module.forward:
            raise ConfigError(
                f"{name!r} is a {type(module).__name__}, which has no forward pass of its own to gather its parameters for; name the "
                f"modules in it, as shard_modules={name + '[.][^.]+'!r} does"
            )
    for name, module in model.named_modules():
        if "forward" in vars(module):
            raise ConfigError(
                f"the forward() of {repr(name) if name else 'the model'} has been replaced, as torch.compile and checkpoint_modules= do, "
                "and shard_modules= gathers parameters around the plain one; leave one of them out"
            )
    _refuse_ties(model, units)
    return dict(sorted(units.items(), key=lambda unit: -unit[0].count(".")))


def is_cut(tensor: torch.Tensor) -> bool:
    """Whether a tensor is one of all ranks together, of which each holds a part (a DTensor, whose module is slow to load)."""
    return hasattr(tensor, "full_tensor")


def own_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor."""
    part: torch.Tensor = tensor.to_local() if is_cut(tensor) else tensor  # type: ignore[attr-defined]
    return part


def owner(name: str, units: dict[str, nn.Module]) -> str:
    """The innermost unit that a parameter's name lies in; "" for the rest of the model."""
    return max((unit for unit in units if name.startswith(f"{unit}.")), key=len, default="")


def check_options(options: ReplicaOptions, optimizer: Optimizer | None) -> None:
    """Refuse what a model that is cut over the ranks cannot have.

    Raises:
        ConfigError: Says what, why, and what to do.
    """
    if options.find_unused_parameters:
        _refuse(
            "find_unused_parameters=True", "ranks that use other parameters would gather others", "freeze or use them"
        )
    if options.static_graph:
        _refuse("static_graph=True", "it is DistributedDataParallel's", "leave it out")
    if options.bucket_bytes is not None:
        _refuse("bucket_bytes=", "each module that is named is exchanged as one piece", "leave it out")
    if options.reduce_dtype is not None:
        _refuse("reduce_dtype=", "its gradients are exchanged by torch, as they are", "leave it out")
    if options.compression is not None:
        _refuse("compression=", "its gradients are exchanged by torch, as they are", "leave it out")
    if options.sync is not None:
        _refuse("sync=", "no rank holds weights to train by itself", "leave it out")
    if optimizer is None:
        return
    if getattr(optimizer, "keeps_masters", False):
        _refuse(
            "MasterWeights", "its copies are of whole parameters", "use float32 parameters and autocast, precision bf16"
        )
    if getattr(optimizer, "spreads_state", False):
        _refuse("a ShardedOptimizer", "the optimizer's state is cut with the parameters", "hand in the plain optimizer")
    if len(optimizer.state):
        _refuse(
            "an optimizer that has stepped",
            "its state is of whole parameters",
            "hand in a new one, and load the state into the replica by load_whole_state()",
        )


def refuse_scaler() -> None:
    """Refuse a GradScaler.

    Raises:
        ConfigError: Always.
    """
    _refuse(
        "a GradScaler", "each rank would look for infinities in its own part alone", "use bfloat16, which needs none"
    )


def refuse_engine(name: str) -> None:
    """Refuse an engine that has no reduce-scatter of its own that torch's FSDP2 could call.

    Raises:
        ConfigError: Always.
    """
    _refuse(
        f"the backend {name}",
        "torch's fully_shard needs a process group of torch.distributed",
        "use --backend torch (under torchrun) or --backend mpi (under mpirun), or leave parameters whole: hvdtrain.ShardedOptimizer",
    )


def _refuse(what: str, why: str, instead: str) -> None:
    raise ConfigError(_WITH.format(what=what, why=why, instead=instead))


def _refuse_ties(model: nn.Module, units: dict[str, nn.Module]) -> None:
    first: dict[torch.nn.Parameter, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        before = first.setdefault(parameter, name)
        if owner(before, units) != owner(name, units):
            raise ConfigError(
                f"{before!r} and {name!r} are one parameter, and shard_modules= puts them into different units; let the pattern match neither "
                "module, or one that holds both"
            )
