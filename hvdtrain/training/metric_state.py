"""What a metric over a whole data set has gathered on one rank, and how the ranks' parts become one.

A torchmetrics object says of each of its states how parts of it are put together. Here they are put together as if one
process had seen all samples in the ranks' order: what was added up is added, lists are joined, and ranks whose metric was
never updated are left out. Its own synchronisation would need torch.distributed, and as many updates on every rank.

Any other object takes part with a method `merge_state`. Nothing here imports torchmetrics.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn


@runtime_checkable
class EpochMetric(Protocol):
    """A metric that is computed over a whole data set, because it is no mean over samples.

    Every object of torchmetrics is one. An object of your own has `merge_state` besides, and can be pickled.
    """

    def reset(self) -> None:
        """Forget every update."""
        ...

    def update(self, *args: Any, **kwargs: Any) -> Any:
        """Take in a batch; the task's `metrics` calls it."""
        ...

    def compute(self) -> Any:
        """Return a number, or a dictionary of numbers."""
        ...


@dataclass(frozen=True, slots=True)
class _Part:
    """One torchmetrics object's states, on the CPU, after so many updates."""

    updates: int
    states: dict[str, Any]


def why_not(metric: object) -> str:
    """Why an object cannot be a metric over the whole data set; "" if it can."""
    if not isinstance(metric, EpochMetric):
        return f"a {type(metric).__name__} has not the methods update, compute and reset of a metric"
    if not _parts_of(metric) and not callable(getattr(metric, "merge_state", None)):
        return (
            f"a {type(metric).__name__} does not say how the ranks' parts of it are put together; give it merge_state(others), which "
            "takes in what the other ranks' objects hold"
        )
    windows = [part for _, part in _parts_of(metric) if any(kind.__name__ == "Running" for kind in type(part).__mro__)]
    if windows:
        return f"a {type(windows[0]).__name__} is computed over the last updates alone, and each rank has its own"
    return ""


def objects_of(metric: object) -> list[object]:
    """The metric and those inside it."""
    return [metric, *(part for _, part in _parts_of(metric) if part is not metric)]


def prepare(metric: EpochMetric, device: torch.device) -> None:
    """Let a metric begin anew, on a device, and compute without torch.distributed."""
    if callable(getattr(metric, "to", None)):
        metric.to(device)  # type: ignore[attr-defined]
    for _, part in _parts_of(metric):
        part.distributed_available_fn = _never
    metric.reset()


def grouping_of(metric: object) -> str:
    """Which metrics of a collection share their states, which a torchmetrics collection decides by its first batch; "" for none."""
    return "; ".join(str(sorted(one.compute_groups.values())) for one in _collections_of(metric))


def was_updated(metric: object) -> bool:
    """Whether a metric has taken in anything, as far as it can be seen."""
    parts = _parts_of(metric)
    return not parts or any(part.update_count for _, part in parts)


def state_of(metric: object) -> Any:
    """Return what a rank's metric has gathered, to be sent to the rank that computes."""
    parts = _parts_of(metric)
    if not parts:
        return metric
    for collection in _collections_of(metric):
        collection.values(copy_state=False)  # members of a group have the state of one
    sent: dict[int, Any] = {}  # a state that several share is sent once
    return {
        path: _Part(part.update_count, {name: _sent(value, sent) for name, value in part.metric_state.items()})
        for path, part in parts
    }


def merge(metric: EpochMetric, states: Sequence[Any], mine: int) -> None:
    """Let a metric hold what all ranks have gathered.

    Args:
        metric: This rank's.
        states: `state_of` of every rank's, in the ranks' order.
        mine: The place of this rank's among them.
    """
    parts = _parts_of(metric)
    if not parts:
        metric.merge_state([state for rank, state in enumerate(states) if rank != mine])  # type: ignore[attr-defined]
        return
    for path, part in parts:
        gathered = [state[path] for state in states if state[path].updates]
        for name, reduction in part._reductions.items() if gathered else ():
            merged = _merged([one.states[name] for one in gathered], [one.updates for one in gathered], reduction)
            setattr(part, name, _on(merged, part.device))
        part._update_count = sum(one.updates for one in gathered)
        part._computed = None


def _parts_of(metric: object) -> list[tuple[str, Any]]:
    """The torchmetrics objects in a torchmetrics object, itself included, each with its path."""
    if not (isinstance(metric, nn.Module) and hasattr(metric, "metric_state")):
        return []
    return [
        (path, part) for path, part in metric.named_modules() if isinstance(getattr(part, "_reductions", None), dict)
    ]


def _collections_of(metric: object) -> list[Any]:
    """The torchmetrics collections in a torchmetrics object, itself included."""
    parts = metric.modules() if isinstance(metric, nn.Module) and _parts_of(metric) else ()
    return [part for part in parts if hasattr(part, "compute_groups")]


def _merged(values: list[Any], updates: list[int], reduction: Any) -> Any:
    """One state out of the ranks'. With one rank alone it is that rank's, as it would be in one process."""
    if isinstance(values[0], list):
        return [item for value in values for item in value]
    if len(values) == 1:
        return values[0]
    name = getattr(reduction, "__name__", "")
    if name == "dim_zero_cat":
        return torch.cat([torch.atleast_1d(value) for value in values])
    stacked = torch.stack(values)
    if reduction is None:
        return stacked
    if name == "dim_zero_mean":  # of the updates, of which ranks may have had unequal numbers
        weights = torch.tensor(updates, dtype=stacked.dtype).reshape(-1, *[1] * (stacked.dim() - 1))
        return (stacked * weights).sum(0) / weights.sum()
    return reduction(stacked)


def _sent(value: Any, sent: dict[int, Any]) -> Any:
    """A state as it travels: on the CPU, so that it can arrive on any device."""
    if id(value) not in sent:
        sent[id(value)] = _mapped(value, _on_cpu, lambda inner: _sent(inner, sent))
    return sent[id(value)]


def _on_cpu(tensor: Tensor) -> Tensor:
    """On the CPU, and no view: one would travel with all that it is a view of."""
    tensor = tensor.detach().cpu()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _on(value: Any, device: torch.device) -> Any:
    return _mapped(value, lambda tensor: tensor.to(device), lambda inner: _on(inner, device))


def _mapped(value: Any, tensor: Callable[[Tensor], Tensor], inner: Callable[[Any], Any]) -> Any:
    if isinstance(value, Tensor):
        return tensor(value)
    if type(value) in (list, tuple):
        return type(value)(inner(item) for item in value)
    if type(value) is dict:
        return {key: inner(item) for key, item in value.items()}
    return value


def _never() -> bool:
    return False
