"""The replica whose ranks train apart and exchange weights every so many steps, the same on every engine.

In between each rank follows the mean over its own samples. An exchange weighs each rank with what its losses were means
over since the last one, so that with one step between exchanges plain SGD comes out, whatever shares the ranks had.
Between exchanges evaluations and checkpoints mean the average of the ranks' weights. An outer optimizer takes its step only when
an exchange is due: its momentum is that of whole rounds, and would carry the weights too far after a part of one.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hvdtrain.backends.backward_graph import ranks_meet
from hvdtrain.backends.communicator import Communicator
from hvdtrain.backends.exclusions import check_combination
from hvdtrain.backends.layout import lay_out_states
from hvdtrain.backends.replica import Replica, ReplicaOptions, StepResult
from hvdtrain.backends.watched import plain_names
from hvdtrain.backends.weighting import Tally
from hvdtrain.backends.wire import SelfWire
from hvdtrain.errors import ConfigError, TrainingError
from hvdtrain.settings.sync import Sync

if TYPE_CHECKING:
    from torch.amp.grad_scaler import GradScaler
    from torch.optim import Optimizer

    from hvdtrain.backends.base import Backend

_log = logging.getLogger(__name__)
_LOOKS = 3  # backward passes in which it is seen whether ranks meet in them


class SeldomReplica(Replica):
    """Exchanges weights and no gradients.

    Args:
        options: As for `Replica`; they say a sync.

    Raises:
        ConfigError: Something was asked for that needs the same gradients on every rank in each step.
    """

    _reuses_gradients = False
    _engine_averages = False

    def __init__(
        self, backend: Backend, module: nn.Module, optimizer: Optimizer | None, options: ReplicaOptions
    ) -> None:
        assert options.sync is not None
        _check(optimizer)
        self._sync: Sync = options.sync
        self._common: dict[nn.Parameter, Tensor] = {}  # the weights of the last exchange, as they are summed
        self._momentum: dict[nn.Parameter, Tensor] = {}
        self._since, self._weight, self._total = 0, 0.0, 0.0  # since that
        self._always = True  # this rank had samples in each of these steps
        self._looks = _LOOKS
        self._is_shared = False  # the model holds common weights for a while
        self._aside: dict[nn.Parameter, Tensor] = {}  # and these are its own then
        super().__init__(backend, module, optimizer, options)

    # -- Replica ------------------------------------------------------------------------------------------------------

    def _weighed_over(self) -> Communicator:
        return Communicator(SelfWire(self._backend.device))  # this rank alone

    def _set_up(self) -> None:
        for parameter in self._parameters:  # new ones are alike on all ranks
            if parameter not in self._common:
                self._common[parameter] = _summable(parameter).clone()

    def backward(self, loss: Tensor, **how: Any) -> None:
        """As of every replica, for the mean over this rank's own samples.

        Raises:
            TrainingError: Also if ranks meet in the backward pass, or inside `shared_weights`.
        """
        if self._is_shared:
            raise TrainingError(
                "a backward pass inside replica.shared_weights() would train weights that are put back at its end; end the block first"
            )
        if self._looks and isinstance(loss, Tensor) and loss.requires_grad:
            self._looks -= 1
            if self._backend.world_size > 1 and ranks_meet(loss):
                raise TrainingError(
                    "sync= (--sync) lets each rank train by itself, and in this model's backward pass the ranks exchange gradients (as batch "
                    "normalisation over all ranks does); leave one of them out"
                )
        super().backward(loss, **how)

    def step(
        self,
        *,
        clip_norm: float | None = None,
        scaler: GradScaler | None = None,
        update: bool = True,
        skip_nonfinite: bool = False,
        want_norm: bool = False,
    ) -> StepResult:
        """As of every replica; clipping acts on this rank's own gradient, whose norm it returns.

        Raises:
            ConfigError: A GradScaler or ``skip_nonfinite`` would let a rank skip a step by itself.
        """
        if skip_nonfinite:
            check_combination({"sync": True, "on_nan": True})
        if scaler is not None and scaler.is_enabled():
            _refuse_scaler()
        return super().step(clip_norm=clip_norm, want_norm=want_norm)

    def expect_scaler(self, scaler: GradScaler | None) -> None:
        """Refuse it."""
        if scaler is not None and scaler.is_enabled():
            _refuse_scaler()

    def _send_during(self, loss: Tensor, weight: Tensor, tally: Tally, retain_graph: bool) -> None:
        loss.backward(weight, retain_graph=retain_graph)
        self.lap("backward")

    def _send_after(self, tally: Tally, empty: bool) -> None:
        pass

    def _finish(self, empty: bool) -> Tensor:
        return torch.tensor(self._weighting.tally.values(), dtype=torch.float64)

    def _board(self) -> None:
        self._aboard = None  # no gradients go anywhere

    def _scale(self, summed: Tally) -> None:
        own, total = self._weighting.own_weight, self._weighting.total
        counts = bool(summed.ranks) and own > 0
        self._always &= counts
        if not counts:
            for parameter in self._watched.trained:
                parameter.grad = None
            self._own = 0.0
            return
        if summed.counted and total is None:
            raise TrainingError(
                "the losses of this step gave different total=; with sync= (--sync) each rank follows the mean over its own samples: "
                "give every loss the same total=, or none"
            )
        super()._scale(summed)
        if summed.counted:
            assert total is not None
            for gradient in self._gradients():
                gradient.mul_(total / own)
            self._total += total
        self._own, self._samples = own, None

    def note_step(self) -> None:
        """The optimizer has stepped; this may be the last step before an exchange."""
        counts = self._is_exchanged
        super().note_step()
        if counts:
            self._weight += self._own
            self._since += 1
            if self._since >= self._sync.steps:
                self.lap("optimizer")
                self._exchange_weights(outer=True)
                self.lap("exchange")

    # -- common weights -----------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Give all ranks their average now, before an exchange is due; every rank must call it after the same step."""
        if self._since:
            self._exchange_weights(outer=False)

    def _exchange_weights(self, *, outer: bool) -> None:
        for parameter, (new, momentum) in self._agreed(outer=outer).items():
            self._write(parameter, new)
            self._common[parameter] = new
            if momentum is not None:
                self._momentum[parameter] = momentum
        self._since, self._weight, self._total, self._always = 0, 0.0, 0.0, True

    @contextmanager
    def shared_weights(self) -> Iterator[None]:
        """Let the model hold the ranks' average; its own weights come back afterwards, bit for bit."""
        if not self._since or self._is_shared:
            yield
            return
        own = {parameter: parameter.detach().clone() for parameter in self._common}
        try:
            for parameter, (new, _) in self._agreed(outer=False).items():
                self._write(parameter, new)
            self._is_shared, self._aside = True, own
            yield
        finally:
            self._is_shared, self._aside = False, {}
            with torch.no_grad():
                for parameter, value in own.items():
                    parameter.copy_(value)

    def copy_from_rank_zero(self) -> None:
        """As of every replica; the next exchange is due as if this had been one."""
        super().copy_from_rank_zero()
        self._begin_anew()

    def whole_state(self) -> dict[str, Any]:
        """As of every replica, with the ranks' average."""
        with self.shared_weights():
            return super().whole_state()

    def load_whole_state(self, state: dict[str, Any]) -> None:
        """As of every replica; the next exchange is due as if this had been one."""
        super().load_whole_state(state)
        self._begin_anew()

    def rank_state(self) -> dict[str, Any]:
        """This rank's own weights and optimizer state, and what all have in common."""
        names = {p: name for name, p in plain_names(self.module).items() if p in self._common}
        return {
            "sync": repr(self._sync),
            "since": [self._since, self._weight, self._total, self._always],
            "own": {  # copies: the model may hold others when it is written
                name: self._aside.get(p, p.detach()).clone() for p, name in names.items()
            },
            "common": {name: self._common[p] for p, name in names.items()},
            "momentum": {name: self._momentum[p] for p, name in names.items() if p in self._momentum},
            "optimizer": self.optimizer.state_dict(),
        }

    def load_rank_states(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Go on as each rank was; on another number of ranks, or with another sync, from the common weights."""
        named = plain_names(self.module)
        same = [state for state in states if state.get("sync") == repr(self._sync)]
        if any("rests" in state for state in states):
            _log.warning("the checkpoint has gradients that a compression had not sent yet; with sync= they are lost")
        self._momentum = {}
        if not same or len(same) != len(states):
            self._begin_anew()
            return
        state = same[self._backend.rank] if len(same) == self._backend.world_size else same[0]
        self._momentum = {
            named[name]: value.to(named[name].device, copy=True)
            for name, value in state["momentum"].items()
            if name in named
        }
        if len(same) != self._backend.world_size:
            self._begin_anew()
            return
        self._since, self._weight, self._total, self._always = state["since"]
        with torch.no_grad():
            for name, value in state["own"].items():
                named[name].copy_(value)
        self._common = {named[name]: value.to(named[name].device, copy=True) for name, value in state["common"].items()}
        self.optimizer.load_state_dict(state["optimizer"])
        lay_out_states(self.optimizer)

    # -- inside -------------------------------------------------------------------------------------------------------

    def _begin_anew(self) -> None:
        self._since, self._weight, self._total, self._always = 0, 0.0, 0.0, True
        self._common = {parameter: _summable(parameter).clone() for parameter in {**self._common}}

    @torch.no_grad()
    def _agreed(self, *, outer: bool) -> dict[nn.Parameter, tuple[Tensor, Tensor | None]]:
        """The ranks' average, or what the outer optimizer makes of it and its new momentum; every rank must call it."""
        whole = self._sum_of_weights()
        share = self._weight / whole if whole else 0.0
        parts = {p: (_summable(p) - common).mul_(share) for p, common in self._common.items()}
        by_dtype: dict[torch.dtype, list[nn.Parameter]] = {}
        for parameter, part in parts.items():
            by_dtype.setdefault(part.dtype, []).append(parameter)
        agreed: dict[nn.Parameter, tuple[Tensor, Tensor | None]] = {}
        for parameters in by_dtype.values():
            flat = torch.cat([parts[p].reshape(-1) for p in parameters])
            self._backend.all_reduce_(flat)
            for parameter, row in zip(parameters, flat.split([parts[p].numel() for p in parameters]), strict=True):
                way = row.view(parts[parameter].shape)
                agreed[parameter] = self._outer_step(parameter, way) if outer else (self._common[parameter] + way, None)
        return agreed

    def _outer_step(self, parameter: nn.Parameter, way: Tensor) -> tuple[Tensor, Tensor | None]:
        """From the common weights on the way to the average, by SGD with Nesterov's momentum as torch.optim has it."""
        common, sync = self._common[parameter], self._sync
        if sync.averages:
            return common + way, None
        before = self._momentum.get(parameter)
        momentum = way.clone() if before is None else before * sync.outer_momentum + way
        return common + (way + momentum * sync.outer_momentum) * sync.outer_lr, momentum

    def _sum_of_weights(self) -> float:
        """What the losses of all ranks were means over since the last exchange.

        Raises:
            TrainingError: On every rank: the ranks did not do the same, or losses are no means over samples.
        """
        mine = [self._weight, self._total if self._always else 0.0, float(self._since), float(self._number)]
        everyone = torch.stack(self._backend.all_gather(torch.tensor(mine, dtype=torch.float64)))
        weights, totals, steps, numbers = everyone.unbind(1)
        if bool((numbers != numbers[0]).any()):
            raise TrainingError(
                "the ranks exchange weights of different replicas; step several replicas in the same order on every rank"
            )
        if bool((steps != steps[0]).any()):
            counts = ", ".join(f"rank {rank}: {int(count)}" for rank, count in enumerate(steps.tolist()))
            raise TrainingError(f"the ranks have taken different numbers of steps since the last exchange ({counts})")
        whole, most = float(weights.sum()), float(totals.max())
        if most and abs(whole - most) > 1e-3 * most:
            raise TrainingError(
                f"the weights of the losses since the last exchange add up to {whole:g} over the ranks, and their total= to {most:g}: they are "
                "not means over parts of one global batch, which sync= (--sync) needs"
            )
        return whole

    @staticmethod
    @torch.no_grad()
    def _write(parameter: nn.Parameter, value: Tensor) -> None:
        _real(parameter).copy_(value)


def _real(parameter: nn.Parameter) -> Tensor:
    plain = parameter.detach()
    return torch.view_as_real(plain) if plain.is_complex() else plain


def _summable(parameter: nn.Parameter) -> Tensor:
    """A parameter's numbers in a type in which they can be summed."""
    real = _real(parameter)
    return real.float() if real.dtype in (torch.float16, torch.bfloat16) else real


def _check(optimizer: Optimizer | None) -> None:
    if optimizer is None:
        raise ConfigError(
            "sync= (--sync) exchanges weights after the optimizer's steps, and this replica was made without one; give "
            "backend.replicate(model, optimizer, sync=...) one"
        )
    check_combination({"sync": True, "shard_optimizer": getattr(optimizer, "spreads_state", False)})
    if getattr(optimizer, "keeps_masters", False):
        raise ConfigError(
            "sync= (--sync) does not go with MasterWeights (--precision bf16-pure), whose float32 copies an exchange of the 16-bit weights would "
            "round; use --precision bf16"
        )


def _refuse_scaler() -> None:
    raise ConfigError(
        "sync= (--sync) does not go with a GradScaler (--precision fp16): each rank would skip steps by itself; use --precision bf16, which "
        "needs none"
    )
