"""What travels between a checkpoint and a file of another format: a model's tensors, and an optimizer's state.

A file holds the model's ``state_dict`` alone, or a dictionary that has it under ``model``, beside ``optimizer`` and
``optimizer_class``. What others call these parts is understood too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hvdtrain.errors import CheckpointError

_MODEL = ("model", "model_state_dict", "state_dict")
_OPTIMIZER = ("optimizer", "optim", "optimizer_state_dict")
_AROUND = ("app",)  # what torch's tutorials put around model and optimizer


@dataclass(frozen=True, kw_only=True, slots=True)
class Content:
    """A model, and an optimizer's state if there is one.

    Attributes:
        model: By the names of its ``state_dict``.
        optimizer: As its ``state_dict`` returned it; None for none.
        optimizer_class: Such as "AdamW"; "" if it is not known.
    """

    model: dict[str, Tensor]
    optimizer: dict[str, Any] | None = None
    optimizer_class: str = ""


def composed(content: Content) -> dict[str, Any]:
    """What is written of it: the model's ``state_dict`` itself, or a dictionary of the parts if there is an optimizer."""
    if content.optimizer is None:
        return dict(content.model)
    parts = {"model": dict(content.model), "optimizer": content.optimizer}
    return parts | ({"optimizer_class": content.optimizer_class} if content.optimizer_class else {})


def taken_apart(found: Any, where: str) -> Content:
    """The model and the optimizer in what a file held.

    Args:
        found: What was read.
        where: How messages name it.

    Raises:
        CheckpointError: It is neither a ``state_dict`` nor a dictionary that has one.
    """
    if not isinstance(found, Mapping):
        raise CheckpointError(
            f"{where} holds a {type(found).__name__}, not a model's state_dict; write torch.save(model.state_dict(), FILE)"
        )
    for name in _AROUND:
        if isinstance(found.get(name), Mapping):
            found = found[name]
    part = next((name for name in _MODEL if isinstance(found.get(name), Mapping)), None)
    if part is None:
        return Content(model=_tensors(found, where))
    optimizer = next((found[key] for key in _OPTIMIZER if found.get(key) is not None), None)
    kind = found.get("optimizer_class", "")
    return Content(
        model=_tensors(found[part], f"{part!r} in {where}"),
        optimizer=None if optimizer is None else _numbered(optimizer, where),
        optimizer_class=kind if isinstance(kind, str) else "",
    )


def _tensors(found: Mapping[Any, Any], where: str) -> dict[str, Tensor]:
    if not found:
        raise CheckpointError(f"{where} is empty; a model's state_dict has at least one tensor")
    for name, value in found.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise CheckpointError(
                f"{where} is no state_dict: {name!r} is a {type(value).__name__}, and only tensors are taken. Expected are a "
                f"model's tensors by name, or a dictionary that has them under one of {', '.join(_MODEL)}"
            )
        if value.layout != torch.strided or value.is_quantized or value.is_meta or type(value) is not Tensor:
            kind = f"{value.layout}" if type(value) is Tensor else type(value).__name__
            raise CheckpointError(
                f"{where}: {name!r} is no dense tensor with values of its own ({kind}), which is not taken"
            )
    return dict(found)


def _numbered(optimizer: Any, where: str) -> dict[str, Any]:
    """An optimizer's state with parameters by number, as optimizers return it; torch.distributed's helpers name them."""
    if not isinstance(optimizer, Mapping) or not isinstance(optimizer.get("param_groups"), list):
        raise CheckpointError(
            f"the optimizer's state in {where} is none: it has no 'param_groups'. Write optimizer.state_dict(), or leave it "
            "out by --no-optimizer"
        )
    groups, state = optimizer["param_groups"], optimizer.get("state", {})
    for group in groups:
        if not isinstance(group, Mapping) or not isinstance(group.get("params"), list):
            raise CheckpointError(
                f"the optimizer's state in {where} is none: one of its param_groups has no list 'params'"
            )
    numbers = {_key(parameter): number for number, parameter in enumerate(_parameters(groups))}
    unknown = [key for key in state if _key(key) not in numbers] if isinstance(state, Mapping) else ["state"]
    if unknown:
        raise CheckpointError(
            f"the optimizer's state in {where} does not fit itself: {unknown[0]!r} is in no param_groups"
        )
    if all(isinstance(parameter, int) for parameter in _parameters(groups)):
        numbers = {_key(parameter): parameter for parameter in _parameters(groups)}
    by_number = sorted(((numbers[_key(key)], dict(value)) for key, value in state.items()), key=lambda item: item[0])
    return {
        "state": dict(by_number),
        "param_groups": [{**group, "params": [numbers[_key(one)] for one in group["params"]]} for group in groups],
    }


def _parameters(groups: list[Mapping[str, Any]]) -> Iterator[Any]:
    return (parameter for group in groups for parameter in group["params"])


def _key(parameter: Any) -> str:
    """Numbers come back as text from where only text is a key."""
    return str(parameter)
