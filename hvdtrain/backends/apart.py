"""What ranks, or groups of ranks, do that train apart and exchange weights every so many steps, the same on every engine.

In between each rank follows the mean over its own samples. An exchange weighs each rank with what its losses were means
over since the last one, so that with one step between exchanges plain SGD comes out, whatever shares the ranks had.
Between exchanges evaluations and checkpoints mean the average of the ranks' weights, as they will be once an exchange that is under
way has arrived. An outer optimizer takes its step only when an exchange is due: its momentum is that of whole rounds, and would
carry the weights too far after a part of one.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hvdtrain.backends.backward_graph import ranks_meet
from hvdtrain.backends.exclusions import check_combination
from hvdtrain.backends.fragments import Fragment, cut
from hvdtrain.backends.groups import Groups
from hvdtrain.backends.layout import lay_out_states
from hvdtrain.backends.outer import outer_step, summable, write_
from hvdtrain.backends.replica import Replica
from hvdtrain.backends.replica_options import ReplicaOptions, StepResult
from hvdtrain.backends.rounds import Round, Way, Window
from hvdtrain.backends.unsent import Unsent
from hvdtrain.backends.watched import plain_names
from hvdtrain.backends.weighting import Tally
from hvdtrain.errors import ConfigError, TrainingError
from hvdtrain.settings.sync import Sync

if TYPE_CHECKING:
    from torch.amp.grad_scaler import GradScaler
    from torch.optim import Optimizer

    from hvdtrain.backends.base import Backend

_log = logging.getLogger(__name__)
_LOOKS = 3  # backward passes in which it is seen whether ranks meet in them


class Apart(Replica):
    """Trains by itself, or in a group of ranks, and exchanges weights with the others every so many steps.

    Args:
        options: As for `Replica`; they say a sync.
        more: For an engine.

    Raises:
        ConfigError: Something was asked for that needs the same gradients on every rank in each step.
    """

    _engine_averages = False

    def __init__(
        self,
        backend: Backend,
        module: nn.Module,
        optimizer: Optimizer | None,
        options: ReplicaOptions,
        **more: Any,
    ) -> None:
        assert options.sync is not None
        _check(optimizer)
        self._sync: Sync = options.sync
        self._common: dict[nn.Parameter, Tensor] = {}  # the weights of the last exchange, as they are summed
        self._momentum: dict[nn.Parameter, Tensor] = {}
        self._fragments = [Fragment(self._sync.first_due(number)) for number in range(self._sync.fragments)]
        self._named: dict[nn.Parameter, str] = {}
        self._not_sent = None if options.compression is None else Unsent(options.compression)
        self._total, self._counts = 0.0, True  # of this step, which counts for this rank
        self._looks = _LOOKS
        self._exchanges = 0
        self._is_shared = False  # the model holds common weights for a while
        self._aside: dict[nn.Parameter, Tensor] = {}  # and these are its own then
        super().__init__(backend, module, optimizer, options, **more)

    # -- Replica ------------------------------------------------------------------------------------------------------

    def _make_alike(self) -> None:
        super()._make_alike()  # the ranks ask for the same groups
        self._together = self._find_groups()
        self._beside = self._backend.beside() if self._sync.delay else self._backend

    def _set_up(self) -> None:
        self._find_new()

    def _find_new(self) -> None:
        """Let parameters that are trained by now be exchanged too."""
        new = [parameter for parameter in self._parameters if parameter not in self._common]  # alike on all ranks
        self._named |= {parameter: name for name, parameter in plain_names(self.module).items()}
        if not self._common:
            if len(new) < len(self._fragments):
                raise ConfigError(
                    f"sync's fragments={len(self._fragments)} (--sync) needs as many parameters at least, and this model trains "
                    f"{len(new)}; give fewer fragments"
                )
            for parameter, part in zip(new, cut([p.numel() for p in new], len(self._fragments)), strict=True):
                self._fragments[part].parameters.append(parameter)
        else:
            for parameter in new:
                smallest = min(self._fragments, key=lambda one: sum(p.numel() for p in one.parameters))
                smallest.parameters.append(parameter)
        for parameter in new:
            self._common[parameter] = summable(parameter).clone()

    def backward(self, loss: Tensor, **how: Any) -> None:
        """As of every replica, for the mean over this rank's own samples.

        Raises:
            TrainingError: Also if ranks meet in the backward pass, or inside `shared_weights`.
        """
        self._refuse_inside("a backward pass")
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
            TrainingError: Inside `shared_weights`.
        """
        self._refuse_inside("step()")
        if skip_nonfinite:
            check_combination({"sync": True, "on_nan": True})
        if scaler is not None and scaler.is_enabled():
            _refuse_scaler()
        return super().step(clip_norm=clip_norm, want_norm=want_norm)

    def expect_scaler(self, scaler: GradScaler | None) -> None:
        """Refuse it."""
        if scaler is not None and scaler.is_enabled():
            _refuse_scaler()

    @abstractmethod
    def _own_weight(self, summed: Tally) -> tuple[float, float | None]:
        """What the losses of this step are means over of those that train together, and what all losses gave as their total."""

    def _find_groups(self) -> Groups | None:
        """Of ranks that train together; every rank must call it."""
        return None

    def _board(self) -> None:
        self._aboard = None  # no gradients reach all ranks

    def _scale(self, summed: Tally) -> None:
        own, total = self._own_weight(summed)
        self._counts, self._total = bool(summed.ranks) and own > 0, 0.0
        if not self._counts:
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
            self._total = total
        self._own, self._samples = own, None

    def note_step(self) -> None:
        """The optimizer has stepped; this may be the last step before an exchange."""
        counts = self._is_exchanged
        super().note_step()
        if not counts:
            return
        self.lap("optimizer")
        for fragment in self._fragments:
            fragment.count(self._own, self._total, self._counts)
            if fragment.under_way is not None:
                fragment.under_way.move_on()
                self._take_in(fragment)
            if fragment.left <= 0:
                self._send_weights(fragment)
                self._take_in(fragment)
        self.lap("exchange")

    # -- common weights -----------------------------------------------------------------------------------------------

    @property
    def exchanges(self) -> int:
        """How often the ranks' common weights have changed."""
        return self._exchanges

    def common_weights(self) -> Mapping[Tensor, Tensor]:
        """By parameter, what all ranks had in common last, in the type in which it is summed; not to be written into."""
        return {
            parameter: torch.view_as_complex(value) if parameter.is_complex() else value
            for parameter, value in self._common.items()
        }

    def settle(self) -> None:
        """Give all ranks their average now, before an exchange is due; every rank must call it after the same step."""
        self._refuse_inside("settle()")
        self._assemble("settle()")
        if not self._apart:
            return
        agreed = self._average()
        for fragment in self._fragments:
            for parameter, landed in self._landed(fragment).items():
                self._keep(parameter, landed)
            fragment.under_way = None
        for parameter, new in agreed.items():
            write_(parameter, new)
            self._common[parameter] = new
        self._count_anew()

    @contextmanager
    def shared_weights(self) -> Iterator[None]:
        """Let the model hold the ranks' average; its own weights come back afterwards, bit for bit.

        Inside, nothing may train or load weights.
        """
        if self._is_shared:
            yield
            return
        self._assemble("shared_weights()")
        own = {parameter: parameter.detach().clone() for parameter in self._common} if self._apart else {}
        try:
            if own:
                for parameter, new in self._average().items():
                    write_(parameter, new)
            self._is_shared, self._aside = True, own
            yield
        finally:
            self._is_shared, self._aside = False, {}
            with torch.no_grad():
                for parameter, value in own.items():
                    parameter.copy_(value)

    def copy_from_rank_zero(self) -> None:
        """As of every replica; the next exchange is due as if this had been one."""
        self._refuse_inside("copy_from_rank_zero()")
        super().copy_from_rank_zero()
        self._begin_anew()

    def whole_state(self) -> dict[str, Any]:
        """As of every replica, with the ranks' average."""
        with self.shared_weights():
            return super().whole_state()

    def load_whole_state(self, state: dict[str, Any]) -> None:
        """As of every replica; the next exchange is due as if this had been one."""
        self._refuse_inside("loading a state")
        super().load_whole_state(state)
        self._begin_anew()

    def rank_state(self) -> dict[str, Any]:
        """This rank's own weights and optimizer state, and what all have in common; every rank must call it.

        An exchange that is under way is waited for, and not taken in before its step.
        """
        names = {p: name for name, p in plain_names(self.module).items() if p in self._common}
        arrived = {
            str(number): {
                "left": one.under_way.left,
                "sent": {names[p]: value for p, value in one.under_way.own.items() if p in names},
                "ways": {names[p]: way for p, way in one.under_way.ways().items() if p in names},
            }
            for number, one in enumerate(self._fragments)
            if one.under_way is not None
        }
        return {
            "sync": repr(self._sync),
            "group": self._leaders[self._backend.rank],
            "own": {  # copies: the model may hold others when it is written
                name: self._aside.get(p, p.detach()).clone() for p, name in names.items()
            },
            "common": {name: self._common[p] for p, name in names.items()},
            "momentum": {name: self._momentum[p] for p, name in names.items() if p in self._momentum},
            "counts": [one.counts for one in self._fragments],
            "fragments": [[names[p] for p in one.parameters if p in names] for one in self._fragments],
            "arrived": arrived,
            "unsent": {}
            if self._not_sent is None
            else self._not_sent.state(((n, p) for p, n in names.items()), speaks=self._speaks[self._backend.rank]),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_rank_states(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Go on as each rank was; on another number of ranks, in other groups, or with another sync, from the common weights."""
        self._refuse_inside("loading a state")
        named = plain_names(self.module)
        if any("rests" in state for state in states):
            _log.warning("the checkpoint has gradients that a compression had not sent yet; with sync= they are lost")
        self._take_unsent([state["unsent"] for state in states if state.get("unsent")], named)
        self._momentum = {}
        same = [state for state in states if state.get("sync") == repr(self._sync)]
        if not same or len(same) != len(states):
            self._begin_anew()
            return
        as_they_were = tuple(state.get("group", rank) for rank, state in enumerate(same)) == self._leaders
        state = same[self._backend.rank] if as_they_were else same[0]

        def placed(values: Mapping[str, Tensor]) -> dict[nn.Parameter, Tensor]:
            known = {named[name]: value for name, value in values.items() if name in named}
            return {parameter: value.to(parameter.device, copy=True) for parameter, value in known.items()}

        self._momentum = placed(state["momentum"])
        if not as_they_were:
            self._begin_anew()
            for one in state["arrived"].values():  # the common weights have come to that already
                for parameter, way in placed(one["ways"]).items():
                    self._keep_momentum(parameter, self._outer(parameter, way)[1])
            return
        with torch.no_grad():
            for name, value in state["own"].items():
                named[name].copy_(value)
        self._common = placed(state["common"])
        for number, fragment in enumerate(self._fragments):
            fragment.take(state["counts"][number])
            fragment.parameters = [named[name] for name in state["fragments"][number]]
            one = state["arrived"].get(str(number))
            fragment.under_way = (
                Round.arrived(placed(one["sent"]), placed(one["ways"]), one["left"], self._sync.delay) if one else None
            )
        self._find_new()
        self.optimizer.load_state_dict(state["optimizer"])
        lay_out_states(self.optimizer)

    # -- inside -------------------------------------------------------------------------------------------------------

    @property
    def _speaks(self) -> tuple[bool, ...]:
        """Of each rank, whether it sends weights."""
        return tuple(leader == rank for rank, leader in enumerate(self._leaders))

    @property
    def _leaders(self) -> tuple[int, ...]:
        """Of each rank, which one sends its weights."""
        return tuple(range(self._backend.world_size)) if self._together is None else self._together.leaders

    @property
    def _apart(self) -> bool:
        """Whether the ranks' weights differ; the same on every rank."""
        return any(one.since or one.under_way is not None for one in self._fragments)

    def _refuse_inside(self, what: str) -> None:
        if self._is_shared:
            raise TrainingError(
                f"{what} inside replica.shared_weights() would change weights that are put back at its end; end the block first"
            )

    def _assemble(self, what: str) -> None:
        """A rank that has taken other steps, or is elsewhere, would wait in another exchange."""
        self._backend.assemble(f"{what} after step {self._steps}")

    def _count_anew(self) -> None:
        for number, fragment in enumerate(self._fragments):
            fragment.begin(self._sync.first_due(number))

    def _begin_anew(self) -> None:
        for fragment in self._fragments:
            if fragment.under_way is not None:
                fragment.under_way.ways()  # its messages must not be left behind
            fragment.under_way = None
        self._count_anew()
        self._common = {parameter: summable(parameter).clone() for parameter in {**self._common}}

    def _take_unsent(self, states: Sequence[Mapping[str, Any]], named: Mapping[str, nn.Parameter]) -> None:
        if self._not_sent is not None:
            self._not_sent.load(states, self._backend.rank, named, self._speaks)
        elif any(state["rests"] for state in states):
            _log.warning(
                "the checkpoint has weights that compression %s had not sent yet; without a compression they are lost",
                states[0]["name"],
            )

    def _way(self, *, due: bool) -> Way:
        """How weights travel that are exchanged in time, at the end of a step, or else for an average in between."""
        exactly = not due
        return Way(
            everyone=self._beside if due else self._backend,
            groups=self._together,
            what=f"exchange of weights after step {self._steps + due}",
            names=self._named,
            compression=None if exactly else self.options.compression,
            unsent=None if exactly else self._not_sent,
            number=self._number,
        )

    def _window(self, fragment: Fragment) -> Window:
        weight, total, steps = fragment.said
        if not self._speaks[self._backend.rank]:  # another rank says it
            weight = total = 0.0
        return Window(tuple(fragment.parameters), (weight, total, steps))

    @torch.no_grad()
    def _send_weights(self, fragment: Fragment) -> None:
        """Begin to exchange a fragment as it is now."""
        own = {p: summable(p) for p in fragment.parameters}
        if self._sync.delay:  # steps are taken before it is needed for the last time
            own = {p: value.clone() for p, value in own.items()}
        window = self._window(fragment)
        fragment.under_way = Round(self._way(due=True), [window], own, self._common, self._sync.delay)
        fragment.begin(self._sync.steps)

    def _take_in(self, fragment: Fragment) -> None:
        """Let what was under way be this rank's weights, if it is due."""
        if fragment.under_way is None or fragment.under_way.left > 0:
            return
        for parameter, landed in self._landed(fragment).items():
            write_(parameter, landed.own)
            self._keep(parameter, landed)
        fragment.under_way = None
        self._exchanges += 1

    def _keep(self, parameter: nn.Parameter, landed: _Landed) -> None:
        self._common[parameter] = landed.common
        self._keep_momentum(parameter, landed.momentum)

    def _keep_momentum(self, parameter: nn.Parameter, momentum: Tensor | None) -> None:
        if momentum is not None:
            self._momentum[parameter] = momentum

    def _outer(self, parameter: nn.Parameter, way: Tensor) -> tuple[Tensor, Tensor | None]:
        return outer_step(self._sync, self._common[parameter], way, self._momentum.get(parameter))

    @torch.no_grad()
    def _landed(self, fragment: Fragment) -> dict[nn.Parameter, _Landed]:
        """What this rank's weights are with what is under way, for which it waits; every rank must call it."""
        landed: dict[nn.Parameter, _Landed] = {}
        if fragment.under_way is None:
            return landed
        for parameter, way in fragment.under_way.ways().items():
            new, momentum = self._outer(parameter, way)
            moved = fragment.since > 0  # since it was sent
            own = summable(parameter) + (new - fragment.under_way.own[parameter]) if moved else new
            landed[parameter] = _Landed(own, new, momentum)
        return landed

    @torch.no_grad()
    def _average(self) -> dict[nn.Parameter, Tensor]:
        """The average of the ranks' weights, with what is under way; every rank must call it."""
        own: dict[nn.Parameter, Tensor] = {}
        common, windows = {**self._common}, []
        for fragment in self._fragments:
            landed = self._landed(fragment)
            common |= {parameter: one.common for parameter, one in landed.items()}
            if fragment.since:
                own |= {p: landed[p].own if p in landed else summable(p) for p in fragment.parameters}
                windows.append(self._window(fragment))
        ways = Round(self._way(due=False), windows, own, common).ways() if windows else {}
        return {parameter: at + ways[parameter] if parameter in ways else at for parameter, at in common.items()}


@dataclass(frozen=True, slots=True)
class _Landed:
    """A parameter after an exchange: this rank's own weights, the common ones, and the outer optimizer's momentum."""

    own: Tensor
    common: Tensor
    momentum: Tensor | None


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
