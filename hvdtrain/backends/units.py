"""Which modules of a model are cut over the ranks as one piece, and what cannot be trained so: the same on every engine."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hvdtrain.backends.watched import COMPILED, without_compile
from hvdtrain.errors import ConfigError

if TYPE_CHECKING:
    from torch.optim import Optimizer


# Tried in all their forms (loops, foreach, fused) against whole parameters.
_CUT = ("SGD", "Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Adagrad", "Adadelta", "RMSprop", "ASGD")
_NOT_FUSED = ("SGD", "Adagrad")


def units_of(model: nn.Module, pattern: str) -> dict[str, nn.Module]:
    """Return the modules that are gathered one at a time, by name, inner ones first; the rest of the model is one more.

    Args:
        model: Whole, on every rank.
        pattern: A regular expression; the whole name must match, as in `torch.nn.Module.named_modules`.

    Raises:
        ConfigError: Nothing matches, a match has no forward pass, a parameter belongs to two units or is none that torch can cut, or
            torch is too old.
    """
    try:
        wanted = re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"shard_modules= is no regular expression: {error} in {pattern!r}") from error
    names: dict[str, tuple[str, nn.Module]] = {}
    for name, module in model.named_modules():
        names.setdefault(without_compile(name), (name, module))  # around torch.compile's wrapper rather than in it
    names.pop("")
    units = {
        name: module
        for plain, (name, module) in names.items()
        if wanted.fullmatch(plain) and any(True for _ in module.parameters())
    }
    if not units:
        some = ", ".join(list(names)[:12])
        raise ConfigError(
            f"no module of {type(model).__name__} with parameters has a name like shard_modules={pattern!r}; there are {some}"
        )
    for name, module in units.items():
        inside: nn.Module = getattr(module, COMPILED, module)
        if type(inside).forward is nn.Module.forward:
            raise ConfigError(
                f"{name!r} is a {type(module).__name__}, which has no forward pass of its own to gather its parameters for; name the "
                f"modules in it, as shard_modules={name + '[.][^.]+'!r} does"
            )
    _refuse_ties(model, units)
    if not torch_can_cut():  # on every engine, also where there is one rank and nothing to cut
        raise ConfigError(
            f"shard_modules= needs a newer torch than {torch.__version__}: one whose fully_shard can add up gradients "
            "(set_force_sum_reduction_for_comms); update torch, or use hvdtrain.ShardedOptimizer"
        )
    _refuse_uncuttable(model, units)
    return dict(sorted(units.items(), key=lambda unit: -unit[0].count(".")))


def is_cut(tensor: torch.Tensor) -> bool:
    """Whether a tensor is one of all ranks together, of which each holds a part (a DTensor, whose module is slow to load)."""
    return hasattr(tensor, "full_tensor")


def own_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor."""
    part: torch.Tensor = tensor.to_local() if is_cut(tensor) else tensor  # type: ignore[attr-defined]
    return part


def state_for_rank_zero(optimizer: Optimizer) -> dict[str, Any]:
    """An optimizer's state_dict; where its state is spread over the ranks, the whole on rank 0 alone. Every rank must call it."""
    gather: Callable[[], dict[str, Any]] = getattr(optimizer, "state_on_rank_zero", optimizer.state_dict)
    return gather()


def cut_like(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A whole tensor, the same on every rank, cut as another one of its shape is, if that is cut; nothing is exchanged."""
    if not is_cut(like) or is_cut(tensor):
        return tensor
    from torch.distributed.tensor import distribute_tensor  # noqa: PLC0415 - loads much of torch

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)  # type: ignore[attr-defined]


def whole(value: Any, *, root: bool) -> Any:
    """A state in which tensors that are cut over the ranks are whole, on rank 0's CPU; every rank must call it.

    Args:
        value: Tensors, lists and dictionaries, in the same order on every rank; other values are kept.
        root: Whether this is rank 0; the others have None for a tensor that is cut. One is put together at a time.
    """
    if isinstance(value, torch.Tensor):
        full = value.full_tensor().detach().cpu() if is_cut(value) else value  # type: ignore[attr-defined]
        return full if root or full is value else None
    if type(value) is dict:
        return {key: whole(item, root=root) for key, item in value.items()}
    return [whole(item, root=root) for item in value] if type(value) is list else value


def owner(name: str, units: dict[str, nn.Module]) -> str:
    """The innermost unit that a parameter's name lies in; "" for the rest of the model."""
    return max((unit for unit in units if name.startswith(f"{unit}.")), key=len, default="")


def nature_of(optimizer: Optimizer | None) -> dict[str, bool]:
    """What an optimizer is, in words of `hvdtrain.backends.exclusions.ASKED_BY`, that may exclude something."""
    kind = type(optimizer).__name__
    return {
        "master_weights": bool(getattr(optimizer, "keeps_masters", False)),
        "shard_optimizer": bool(getattr(optimizer, "spreads_state", False)),
        "uncut_optimizer": optimizer is not None
        and type(optimizer).__module__.startswith("torch.optim")
        and (kind not in _CUT or (kind in _NOT_FUSED and any(group.get("fused") for group in optimizer.param_groups))),
    }


def _refuse_ties(model: nn.Module, units: dict[str, nn.Module]) -> None:
    first: dict[torch.nn.Parameter, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        before = first.setdefault(parameter, name)
        if owner(before, units) != owner(name, units):
            raise ConfigError(
                f"{before!r} and {name!r} are one parameter, and shard_modules= puts them into different units; let the pattern match neither "
                "module, or one that holds both"
            )


def _refuse_uncuttable(model: nn.Module, units: dict[str, nn.Module]) -> None:
    kinds: dict[str, tuple[str, torch.dtype]] = {}  # of each unit, its first trained parameter's
    for name, parameter in model.named_parameters():
        if why := _why_uncut(parameter):
            raise ConfigError(f"{name!r} cannot be cut over the ranks (shard_modules=): {why}")
        if parameter.requires_grad:
            first, kind = kinds.setdefault(owner(name, units), (name, parameter.dtype))
            if parameter.dtype != kind:
                raise ConfigError(
                    f"{first!r} is of {kind} and {name!r} of {parameter.dtype}, and shard_modules= puts them into one unit, whose gradients "
                    "travel together: let the pattern match the module of one of them, or convert the model"
                )


def _why_uncut(parameter: torch.nn.Parameter) -> str:
    """Why torch's fully_shard does not take a parameter, with the remedy; "" if it does."""
    if parameter.dim() == 0:
        return "it has no dimension; give it one, of size 1: torch.nn.Parameter(torch.ones(1))"
    if not parameter.numel():
        return f"it has no numbers, and shape {tuple(parameter.shape)}; leave it out of the model"
    if not parameter.is_contiguous():
        return f"it is not contiguous (shape {tuple(parameter.shape)}, strides {parameter.stride()}); make it of tensor.contiguous()"
    return ""


def torch_can_cut() -> bool:
    """Whether this torch's fully_shard can add up gradients, which it could not always."""
    fsdp = importlib.import_module("torch.distributed.fsdp")
    return hasattr(getattr(fsdp, "FSDPModule", None), "set_force_sum_reduction_for_comms")
