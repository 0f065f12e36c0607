"""All ranks hold the same model: check that they can, then make it so from rank 0."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hvdtrain.backends.forms import WIRE_DTYPE
from hvdtrain.backends.layout import bytes_of, lay_out_states
from hvdtrain.errors import ModelMismatch

if TYPE_CHECKING:
    from hvdtrain.backends.communicator import Communicator


class Broadcasts(Protocol):
    """What `copy_optimizer` asks of a communicator."""

    @property
    def wire(self) -> Any:
        """Whose ``rank`` is 0 on the rank that is copied."""

    def broadcast_object(self, obj: Any) -> Any:
        """A copy of rank 0's object."""

    def broadcast(self, tensor: Tensor) -> Tensor:
        """A copy of rank 0's tensor."""


_Row = tuple[str, str]  # name, description


def check_same_structure(
    gather: Callable[[str], list[str]],
    module: nn.Module,
    optimizer: Optimizer | None = None,
    contents: Sequence[nn.Parameter] = (),
    settings: Mapping[str, object] = MappingProxyType({}),
) -> None:
    """Compare names, shapes, dtypes and trainability over the ranks.

    One small exchange when all is well.

    Args:
        gather: Collects every rank's text on every rank.
        module: The model.
        optimizer: Its parameter groups are compared too.
        contents: Parameters that must hold the same numbers already.
        settings: What else must be the same.

    Raises:
        ModelMismatch: On every rank; names the first differing parameter, buffer or setting, and the ranks.
    """
    rows = [(f"setting {name}", str(value)) for name, value in settings.items()]
    rows += _describe(module, optimizer, {id(p) for p in contents})
    digest = hashlib.sha256(repr(rows).encode()).hexdigest()
    if set(gather(digest)) == {digest}:
        return
    everyone: list[list[_Row]] = [
        [(name, text) for name, text in json.loads(theirs)] for theirs in gather(json.dumps(rows))
    ]
    reference = everyone[0]
    for position in range(max(len(rows) for rows in everyone)):
        at = [_at(rows, position) for rows in everyone]
        differing = [rank for rank, row in enumerate(at) if row != at[0]]
        if differing:
            rank = differing[0]
            raise ModelMismatch(
                f"the ranks hold different models: at position {position}, rank 0 has {_say(at[0])}, "
                f"rank{'s' if len(differing) > 1 else ''} {', '.join(map(str, differing))} {_say(at[rank])}. "
                "Build the model the same way on every rank (no branch on the rank, one configuration; parts added later from the same "
                "seed, or followed by replica.copy_from_rank_zero())"
            )
    raise ModelMismatch(f"the ranks hold different models ({len(reference)} rows compared)")


def copy_state_from_rank_zero(communicator: Communicator, module: nn.Module, optimizer: Optimizer | None) -> None:
    """Overwrite parameters, buffers (the non-persistent too) and optimizer state with rank 0's.

    The optimizer is never stepped: on a fresh optimizer there is no state to copy, and a step would move the weights.
    """
    if communicator.wire.size == 1:
        return
    with torch.no_grad():
        for tensors in _by_dtype([*module.parameters(), *module.buffers()]):
            if tensors[0].dtype not in WIRE_DTYPE:
                for tensor in tensors:
                    overwrite_from_rank_zero(communicator, tensor)
                continue
            flat = torch.cat([t.reshape(-1) for t in tensors])
            communicator.broadcast_(flat)
            for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
                tensor.copy_(part.view_as(tensor))
    if optimizer is not None:
        copy_optimizer(communicator, optimizer)


def overwrite_from_rank_zero(communicator: Communicator, tensor: Tensor) -> None:
    """Write rank 0's numbers into a dense tensor, also of a dtype that collectives do not take (float8, 16-bit unsigned integers)."""
    if tensor.dtype in WIRE_DTYPE:
        communicator.broadcast_(tensor)
        return
    data = tensor.contiguous()
    communicator.broadcast_(bytes_of(data))
    if data is not tensor:
        tensor.copy_(data)


def _describe(module: nn.Module, optimizer: Optimizer | None, contents: set[int]) -> list[_Row]:
    rows = [
        (
            f"parameter {name!r}",
            f"{p.dtype} {tuple(p.shape)}{'' if p.requires_grad else ' frozen'}{_content(p) if id(p) in contents else ''}",
        )
        for name, p in module.named_parameters()
    ]
    rows += [(f"buffer {name!r}", f"{b.dtype} {tuple(b.shape)}") for name, b in module.named_buffers()]
    if optimizer is not None:
        names = {id(p): name for name, p in module.named_parameters()}
        rows.append(("optimizer", type(optimizer).__qualname__))
        for index, group in enumerate(optimizer.param_groups):
            held = ", ".join(names.get(id(p), "?") for p in group["params"])
            rows.append((f"optimizer group {index}", f"{sorted(k for k in group if k != 'params')} of {held}"))
    return rows


def _content(parameter: nn.Parameter) -> str:
    data = bytes_of(parameter.detach().cpu().contiguous())
    return f" with content {hashlib.sha256(data.numpy().tobytes()).hexdigest()[:8]}"


def _at(rows: list[_Row], position: int) -> _Row | None:
    return rows[position] if position < len(rows) else None


def _say(row: _Row | None) -> str:
    return "nothing" if row is None else f"{row[0]} {row[1]}"


def _by_dtype(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    groups: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        if tensor.numel():
            groups.setdefault(tensor.dtype, []).append(tensor)
    return list(groups.values())


def copy_optimizer(communicator: Communicator | Broadcasts, optimizer: Optimizer) -> None:
    """Write rank 0's settings and state into the optimizer's own dictionaries and tensors, where users may hold them.

    ``load_state_dict`` would put new ones in their place, and round states to their parameters' type.
    """
    root = communicator.wire.rank == 0
    own: list[Tensor] = []
    mine = _take_tensors(optimizer.state_dict(), own)
    outline = communicator.broadcast_object(mine if root else None)
    stands = _stands(outline)
    tensors = own if root else [torch.empty(stand.shape, dtype=stand.dtype) for stand in stands]
    received = [communicator.broadcast(tensor.detach()) for tensor in tensors]
    if root:
        return
    with torch.no_grad():
        if repr(mine) == repr(outline):
            for tensor, value in zip(own, received, strict=True):
                tensor.copy_(value)
        elif (
            type(optimizer).state_dict is Optimizer.state_dict
            and type(optimizer).load_state_dict is Optimizer.load_state_dict
        ):
            _overwrite(optimizer, _put_tensors(outline, received))
        else:
            optimizer.load_state_dict(_put_tensors(outline, received))
        lay_out_states(optimizer)


def _overwrite(optimizer: Optimizer, theirs: dict[str, Any]) -> None:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for group, other in zip(optimizer.param_groups, theirs["param_groups"], strict=True):
        for name, value in other.items():
            if name != "params":
                group[name] = _into(group.get(name), value)
    for index, parameter in enumerate(parameters):
        state = theirs["state"].get(index)
        if state is None:
            optimizer.state.pop(parameter, None)
            continue
        before = optimizer.state[parameter]
        kept = {name: _into(before.get(name), value, parameter) for name, value in state.items()}
        before.clear()
        before.update(kept)


def _into(own: Any, value: Any, parameter: nn.Parameter | None = None) -> Any:
    """``value``, in the tensor that is there if it fits; a state of the parameter's shape on the parameter's device."""
    if not isinstance(value, Tensor):
        return value
    if isinstance(own, Tensor) and own.shape == value.shape and own.dtype == value.dtype:
        return own.copy_(value)
    return value.to(parameter.device) if parameter is not None and value.shape == parameter.shape else value


def _take_tensors(value: Any, into: list[Tensor]) -> Any:
    """Replace each tensor of a nested structure by a stand-in, and collect the tensors."""
    if isinstance(value, Tensor):
        into.append(value)
        return _Stand(len(into) - 1, value.dtype, tuple(value.shape))
    if isinstance(value, dict):
        return {k: _take_tensors(v, into) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_take_tensors(v, into) for v in value)
    return value


def _put_tensors(value: Any, tensors: list[Tensor]) -> Any:
    if isinstance(value, _Stand):
        return tensors[value.index]
    if isinstance(value, dict):
        return {k: _put_tensors(v, tensors) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_put_tensors(v, tensors) for v in value)
    return value


def _stands(value: Any) -> list[_Stand]:
    """The stand-ins of an outline, in the order in which they were made."""
    if isinstance(value, _Stand):
        return [value]
    children = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [stand for child in children for stand in _stands(child)]


class _Stand:
    """Stands for a tensor in an outline."""

    def __init__(self, index: int, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        self.index, self.dtype, self.shape = index, dtype, shape

    def __repr__(self) -> str:
        return f"tensor {self.index} {self.dtype} {self.shape}"
