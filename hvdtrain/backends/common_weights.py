"""The weights that ranks which train apart had in common last, and what is on its way to become of them; and how that is saved.

Between exchanges the common weights are what the last one left. An outer optimizer takes its step only when an exchange is due:
its momentum is that of whole rounds, and would carry the weights too far after a part of one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hvdtrain.backends.fragments import Fragment, cut
from hvdtrain.backends.outer import outer_step, summable, write_
from hvdtrain.backends.rounds import Round, Way, Window
from hvdtrain.errors import ConfigError
from hvdtrain.settings.sync import Sync


@dataclass(frozen=True, slots=True)
class Landed:
    """A parameter after an exchange: this rank's own weights, the common ones, and the outer optimizer's momentum."""

    own: Tensor
    common: Tensor
    momentum: Tensor | None


class CommonWeights:
    """What one replica knows of it.

    Args:
        sync: How often weights are exchanged, and in how many fragments.
        way: Returns what an exchange goes over, given ``beside`` (steps are taken meanwhile) and ``exactly`` (nothing is
            compressed).
        speaks: Whether this rank tells the others how much its steps weigh.

    Attributes:
        of: By parameter, the weights of the last exchange, as they are summed.
        exchanges: How often they have changed.
    """

    def __init__(self, sync: Sync, way: Callable[..., Way], speaks: Callable[[], bool]) -> None:
        self._sync, self._way, self._speaks = sync, way, speaks
        self.of: dict[nn.Parameter, Tensor] = {}
        self.exchanges = 0
        self._momentum: dict[nn.Parameter, Tensor] = {}
        self._fragments = [Fragment(sync.first_due(number)) for number in range(sync.fragments)]

    def follow(self, trained: Sequence[nn.Parameter]) -> None:
        """Exchange these parameters; those that are new are alike on all ranks.

        Raises:
            ConfigError: There are fewer than fragments.
        """
        new = [parameter for parameter in trained if parameter not in self.of]
        if not self.of:
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
            self.of[parameter] = summable(parameter).clone()

    @property
    def differ(self) -> bool:
        """Whether the ranks' weights do; the same on every rank."""
        return any(one.since or one.under_way is not None for one in self._fragments)

    def after_step(self, weight: float, total: float, *, counts: bool) -> None:
        """Note a step, and exchange what is due after it.

        Args:
            weight: What this rank's losses were means over.
            total: That of the whole global batch, if losses said it; else 0.
            counts: Whether this rank had any.
        """
        for fragment in self._fragments:
            fragment.count(weight, total, counts)
            if fragment.under_way is not None:
                fragment.under_way.move_on()
                self._take_in(fragment)
            if fragment.left <= 0:
                self._send(fragment)
                self._take_in(fragment)

    def settle(self) -> None:
        """Give all ranks their average now; every rank must call it."""
        agreed = self.average()
        for fragment in self._fragments:
            for parameter, landed in self._landed(fragment).items():
                self._keep(parameter, landed)
            fragment.under_way = None
        for parameter, new in agreed.items():
            write_(parameter, new)
            self.of[parameter] = new
        self._count_anew()

    def begin_anew(self) -> None:
        """The ranks' weights are alike now: the next exchange is due as if this had been one."""
        for fragment in self._fragments:
            if fragment.under_way is not None:
                fragment.under_way.ways()  # its messages must not be left behind
            fragment.under_way = None
        self._count_anew()
        self.of = {parameter: summable(parameter).clone() for parameter in {**self.of}}

    @torch.no_grad()
    def average(self) -> dict[nn.Parameter, Tensor]:
        """The average of the ranks' weights, with what is under way; every rank must call it."""
        own: dict[nn.Parameter, Tensor] = {}
        common, windows = {**self.of}, []
        for fragment in self._fragments:
            landed = self._landed(fragment)
            common |= {parameter: one.common for parameter, one in landed.items()}
            if fragment.since:
                own |= {p: landed[p].own if p in landed else summable(p) for p in fragment.parameters}
                windows.append(self._window(fragment))
        ways = Round(self._way(exactly=True), windows, own, common).ways() if windows else {}
        return {parameter: at + ways[parameter] if parameter in ways else at for parameter, at in common.items()}

    # -- saved --------------------------------------------------------------------------------------------------------

    def state(self, names: Mapping[nn.Parameter, str], own: Mapping[nn.Parameter, Tensor]) -> dict[str, Any]:
        """This rank's part, to be saved. An exchange that is under way is waited for, and not taken in before its step.

        Args:
            names: Of the parameters that are saved.
            own: This rank's weights, where the model holds others for a while.
        """
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
            "own": {  # copies: the model may hold others when it is written
                name: own.get(p, p.detach()).clone() for p, name in names.items()
            },
            "common": {name: self.of[p] for p, name in names.items()},
            "momentum": {name: self._momentum[p] for p, name in names.items() if p in self._momentum},
            "counts": [one.counts for one in self._fragments],
            "fragments": [[names[p] for p in one.parameters if p in names] for one in self._fragments],
            "arrived": arrived,
        }

    def go_on(
        self, states: Sequence[Mapping[str, Any]], named: Mapping[str, nn.Parameter], rank: int, leaders: Sequence[int]
    ) -> bool:
        """Take up what was saved; every rank must call it.

        Args:
            states: Of all ranks that saved one.
            named: This model's parameters.
            rank: This rank's.
            leaders: Of each rank, which one sends its weights.

        Returns:
            Whether this rank goes on exactly as it was. On another number of ranks, in other groups, or with another sync, all go
            on from the common weights, which the model holds.
        """
        self._momentum = {}
        same = [state for state in states if state.get("sync") == repr(self._sync)]
        if not same or len(same) != len(states):
            self.begin_anew()
            return False
        as_they_were = [state.get("group", at) for at, state in enumerate(same)] == list(leaders)
        state = same[rank] if as_they_were else same[0]

        def placed(values: Mapping[str, Tensor]) -> dict[nn.Parameter, Tensor]:
            known = {named[name]: value for name, value in values.items() if name in named}
            return {parameter: value.to(parameter.device, copy=True) for parameter, value in known.items()}

        self._momentum = placed(state["momentum"])
        if not as_they_were:
            self.begin_anew()
            for one in state["arrived"].values():  # the common weights have come to that already
                for parameter, way in placed(one["ways"]).items():
                    self._keep_momentum(parameter, self._outer(parameter, way)[1])
            return False
        with torch.no_grad():
            for name, value in state["own"].items():
                named[name].copy_(value)
        self.of = placed(state["common"])
        for number, fragment in enumerate(self._fragments):
            fragment.take(state["counts"][number])
            fragment.parameters = [named[name] for name in state["fragments"][number]]
            one = state["arrived"].get(str(number))
            fragment.under_way = (
                Round.arrived(placed(one["sent"]), placed(one["ways"]), one["left"], self._sync.delay) if one else None
            )
        return True

    # -- inside -------------------------------------------------------------------------------------------------------

    def _count_anew(self) -> None:
        for number, fragment in enumerate(self._fragments):
            fragment.begin(self._sync.first_due(number))

    def _window(self, fragment: Fragment) -> Window:
        weight, total, steps = fragment.said
        if not self._speaks():  # another rank says it
            weight = total = 0.0
        return Window(tuple(fragment.parameters), (weight, total, steps))

    @torch.no_grad()
    def _send(self, fragment: Fragment) -> None:
        """Begin to exchange a fragment as it is now."""
        own = {p: summable(p) for p in fragment.parameters}
        if self._sync.delay:  # steps are taken before it is needed for the last time
            own = {p: value.clone() for p, value in own.items()}
        window = self._window(fragment)
        fragment.under_way = Round(self._way(beside=True), [window], own, self.of, self._sync.delay)
        fragment.begin(self._sync.steps)

    def _take_in(self, fragment: Fragment) -> None:
        """Let what was under way be this rank's weights, if it is due."""
        if fragment.under_way is None or fragment.under_way.left > 0:
            return
        for parameter, landed in self._landed(fragment).items():
            write_(parameter, landed.own)
            self._keep(parameter, landed)
        fragment.under_way = None
        self.exchanges += 1

    def _keep(self, parameter: nn.Parameter, landed: Landed) -> None:
        self.of[parameter] = landed.common
        self._keep_momentum(parameter, landed.momentum)

    def _keep_momentum(self, parameter: nn.Parameter, momentum: Tensor | None) -> None:
        if momentum is not None:
            self._momentum[parameter] = momentum

    def _outer(self, parameter: nn.Parameter, way: Tensor) -> tuple[Tensor, Tensor | None]:
        return outer_step(self._sync, self.of[parameter], way, self._momentum.get(parameter))

    @torch.no_grad()
    def _landed(self, fragment: Fragment) -> dict[nn.Parameter, Landed]:
        """What this rank's weights are with what is under way, for which it waits; every rank must call it."""
        landed: dict[nn.Parameter, Landed] = {}
        if fragment.under_way is None:
            return landed
        for parameter, way in fragment.under_way.ways().items():
            new, momentum = self._outer(parameter, way)
            moved = fragment.since > 0  # since it was sent
            own = summable(parameter) + (new - fragment.under_way.own[parameter]) if moved else new
            landed[parameter] = Landed(own, new, momentum)
        return landed
