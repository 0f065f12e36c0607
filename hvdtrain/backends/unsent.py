"""What a replica's compression has not sent yet, and what else it remembers of each parameter.

An exchange's rests are kept only once its gradients have been used: a step that is skipped leaves everything as it was.
Rests are in the gradient's own units (a mean over samples, no loss scale), so that they can be added to any later one.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hvdtrain.backends.loss_scale import scale_of
from hvdtrain.compression.base import Compression, Memory
from hvdtrain.errors import ConfigError, TrainingError

if TYPE_CHECKING:
    from torch.amp.grad_scaler import GradScaler
    from torch.optim import Optimizer

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Remembered:
    """Of one parameter.

    Attributes:
        rest: This rank's part of the gradient that was not sent, of the parameter's shape; None for nothing.
        memory: The compression's.
    """

    rest: Tensor | None = None
    memory: Memory = field(default_factory=dict)


class Unsent:
    """What one replica's compression remembers.

    Args:
        compression: Whose memory it is.
    """

    def __init__(self, compression: Compression) -> None:
        self._compression = compression
        self._kept: dict[nn.Parameter, Remembered] = {}
        self._new: dict[nn.Parameter, Remembered] = {}
        self._flags: list[Tensor] = []
        self._scaler: GradScaler | None = None
        self._scale = 1.0  # of the losses, as it was thought to be when gradients were compressed

    def of(self, parameter: nn.Parameter) -> Remembered:
        """What is remembered of a parameter."""
        found = self._kept.get(parameter, Remembered())
        return Remembered() if found.rest is not None and found.rest.shape != parameter.shape else found

    @property
    def any_rest(self) -> bool:
        """Whether something waits to be sent."""
        return any(one.rest is not None for one in self._kept.values())

    def note(self, parameter: nn.Parameter, remembered: Remembered) -> None:
        """What will be remembered once this step's gradients have been used."""
        self._new[parameter] = remembered

    def withdraw(self, parameter: nn.Parameter) -> None:
        """This parameter's gradient will not be used."""
        self._new.pop(parameter, None)

    def only_if_finite(self, flag: Tensor) -> None:
        """Keep nothing of this step if a number, the same on every rank, is none."""
        self._flags.append(flag)

    def expect(self, scaler: GradScaler | None) -> None:
        """Losses are scaled by it from now on."""
        self._scaler = scaler

    def unit(self, factor: float | None, began: int) -> float | None:
        """What makes gradients, as they are exchanged, a mean over samples without a loss scale; None if there is no mean.

        Args:
            factor: What makes a mean of them; None or NaN if there is none.
            began: When the step's first backward pass did (`hvdtrain.backends.loss_scale.now`).
        """
        if factor is None or math.isnan(factor):
            return None
        scaled = self._scaler is not None and self._scaler.is_enabled()
        self._scale = scale_of(self._scaler, began) if self._scaler is not None and scaled else 1.0
        return factor / self._scale

    def settle(self, scaler: GradScaler, began: int) -> None:
        """See that gradients were compressed by the scale that their losses have.

        Raises:
            TrainingError: They were not, and what was added to them was of another scale.
        """
        scale = scale_of(scaler, began)
        if scale != self._scale and self.any_rest:
            raise TrainingError(
                "the losses of this step were scaled by a GradScaler that was not known when their gradients were compressed; call "
                "replica.expect_scaler(scaler) before the first backward(), or give LoopState the scaler"
            )
        factor = self._scale / scale
        self._new = {
            parameter: Remembered(None if one.rest is None else one.rest * factor, one.memory)
            for parameter, one in self._new.items()
        }
        self._scaler = scaler

    def used(self, optimizer: Optimizer | None) -> None:
        """This step's gradients have been used; by a fused optimizer only if no infinity was found in them."""
        infinite = getattr(optimizer, "found_inf", None)
        if infinite is None or not bool(infinite):
            self.keep()

    def keep(self) -> None:
        """Remember what is new, if the numbers that say so are finite."""
        if all(math.isfinite(float(flag)) for flag in self._flags):
            self._kept.update(self._new)
        self.forget()

    def forget(self) -> None:
        """This step's gradients have not been used."""
        self._new, self._flags = {}, []

    def state(self, named: Iterable[tuple[str, nn.Parameter]], *, speaks: bool = True) -> dict[str, Any]:
        """This rank's part of the state, as tensors and text.

        Args:
            named: The model's parameters.
            speaks: Whether this rank sends anything: of a group of ranks one does.
        """
        known = [(name, self._kept[p]) for name, p in named if p in self._kept]
        return {
            "name": self._compression.name,
            "speaks": speaks,
            "rests": {name: one.rest for name, one in known if one.rest is not None},
            "memories": {name: dict(one.memory) for name, one in known if one.memory},
        }

    def load(
        self, states: Sequence[Mapping[str, Any]], rank: int, named: Mapping[str, nn.Parameter], speaks: Sequence[bool]
    ) -> None:
        """Go on from a state.

        If as many ranks speak, and the same ones, each takes its own; else all rests are added up, and each takes an equal part.

        Args:
            states: Of all ranks that saved one.
            rank: This rank's.
            named: The model's parameters.
            speaks: Of each rank that there is now, whether it sends anything.
        """
        self.forget()
        self._kept = {}
        if not states or not speaks[rank]:
            return
        spoke = [bool(state.get("speaks", True)) for state in states]
        first = states[spoke.index(True)]
        memories = first["memories"] if first["name"] == self._compression.name else {}
        for name, parameter in named.items():
            if spoke == list(speaks):
                rest = states[rank]["rests"].get(name)
            else:
                rests = [state["rests"][name] for state in states if name in state["rests"]]
                rest = (
                    torch.stack([each.double() for each in rests]).sum(0).div_(sum(speaks)).to(rests[0].dtype)
                    if rests
                    else None
                )
            if rest is not None and rest.shape != parameter.shape:
                rest = None
            if rest is not None or name in memories:
                self._kept[parameter] = Remembered(
                    None if rest is None else rest.to(parameter.device, copy=True), memories.get(name, {})
                )


def say_lost(states: Iterable[Mapping[str, Any]], what: str, why: str) -> None:
    """Warn of rests with which nothing goes on.

    Args:
        states: From `Unsent.state`, of all ranks that saved one.
        what: They are of, in the plural.
        why: They are lost.
    """
    names = [state["name"] for state in states if state["rests"]]
    if names:
        _log.warning(
            "the checkpoint has %s that compression %s had not sent yet; %s they are lost", what, names[0], why
        )


def takes(compression: Compression, parameter: nn.Parameter) -> bool:
    """Whether a parameter's gradient is compressed."""
    return parameter.numel() > 0 and not parameter.is_complex() and compression.takes(tuple(parameter.shape))


def check_compression(compression: Compression, module: nn.Module) -> None:
    """Refuse a compression that would leave every gradient as it is.

    Raises:
        ConfigError: It would.
    """
    if not any(takes(compression, p) for p in module.parameters() if p.requires_grad):
        shapes = sorted({tuple(p.shape) for p in module.parameters() if p.requires_grad}, key=str)[:6]
        raise ConfigError(
            f"compression {compression.name} would compress nothing of this model: it leaves parameters of one dimension as they are, "
            f"and matrices that would not become smaller (shapes {', '.join(map(str, shapes))}); leave compression out"
        )
