"""What ranks, or groups of ranks, do that train apart and exchange weights every so many steps, the same on every engine.

In between each rank follows the mean over its own samples. An exchange weighs each rank with what its losses were means
over since the last one, so that with one step between exchanges plain SGD comes out, whatever shares the ranks had.
Between exchanges evaluations and checkpoints mean the average of the ranks' weights, as they will be once an exchange that is under
way has arrived (`hvdtrain.backends.common_weights`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hvdtrain.backends.backward_graph import ranks_meet
from hvdtrain.backends.coded import Alike
from hvdtrain.backends.common_weights import CommonWeights
from hvdtrain.backends.exclusions import check_combination, sentence
from hvdtrain.backends.groups import Groups
from hvdtrain.backends.outer import write_
from hvdtrain.backends.replica import Replica
from hvdtrain.backends.replica_options import ReplicaOptions, StepResult
from hvdtrain.backends.rounds import Way
from hvdtrain.backends.unsent import Unsent, say_lost
from hvdtrain.backends.watched import plain_names
from hvdtrain.backends.weighting import Tally
from hvdtrain.errors import ConfigError, TrainingError
from hvdtrain.settings.sync import Sync

if TYPE_CHECKING:
    from torch.amp.grad_scaler import GradScaler
    from torch.optim import Optimizer

    from hvdtrain.backends.base import Backend

_INSIDE = (
    "{what} inside replica.shared_weights() would change weights that are put back at its end; end the block first"
)
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
        if optimizer is None:
            raise ConfigError(
                "sync= (--sync) exchanges weights after the optimizer's steps, and this replica was made without one; give "
                "backend.replicate(model, optimizer, sync=...) one"
            )
        self._sync: Sync = options.sync
        self._common = CommonWeights(self._sync, self._way, lambda: self._speaks[backend.rank])
        self._named: dict[nn.Parameter, str] = {}
        self._not_sent = None if options.compression is None else Unsent(options.compression)
        self._alike: Alike = set()  # what the ranks send of compressed weights
        self._total, self._counts = 0.0, True  # of this step, which counts for this rank
        self._looks = _LOOKS
        self._is_shared = False  # the model holds common weights for a while
        self._aside: dict[nn.Parameter, Tensor] = {}  # and these are its own then
        super().__init__(backend, module, optimizer, options, **more)

    # -- Replica ------------------------------------------------------------------------------------------------------

    def _make_alike(self) -> None:
        super()._make_alike()  # the ranks ask for the same groups
        self._together = self._find_groups()
        self._beside = self._backend.beside() if self._sync.delay else self._backend

    def _set_up(self) -> None:
        self._named |= {parameter: name for name, parameter in plain_names(self.module).items()}
        self._common.follow(self._parameters)

    def backward(self, loss: Tensor, **how: Any) -> None:
        """As of every replica, for the mean over this rank's own samples.

        Raises:
            TrainingError: Also if ranks meet in the backward pass, or inside `shared_weights`.
        """
        self._refuse_inside("a backward pass")
        if self._looks and isinstance(loss, Tensor) and loss.requires_grad:
            self._looks -= 1
            if self._backend.world_size > 1 and ranks_meet(loss):
                raise TrainingError(sentence("sync", "meeting_ranks"))
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
        check_combination({"sync": True, "on_nan": skip_nonfinite, "scaler": _scales(scaler)})
        return super().step(clip_norm=clip_norm, want_norm=want_norm)

    def expect_scaler(self, scaler: GradScaler | None) -> None:
        """Refuse it."""
        check_combination({"sync": True, "scaler": _scales(scaler)})

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
        self._common.after_step(self._own, self._total, counts=self._counts)
        self.lap("exchange")

    def why_no_step(self) -> str:
        """As of every replica; inside `shared_weights` it may not."""
        return _INSIDE.format(what="optimizer.step()") if self._is_shared else super().why_no_step()

    # -- common weights -----------------------------------------------------------------------------------------------

    @property
    def exchanges(self) -> int:
        """How often the ranks' common weights have changed."""
        return self._common.exchanges

    def common_weights(self) -> Mapping[Tensor, Tensor]:
        """By parameter, what all ranks had in common last, in the type in which it is summed; not to be written into."""
        return {
            parameter: torch.view_as_complex(value) if parameter.is_complex() else value
            for parameter, value in self._common.of.items()
        }

    def settle(self) -> None:
        """Give all ranks their average now, before an exchange is due; every rank must call it after the same step."""
        self._refuse_inside("settle()")
        self._assemble("settle()")
        if self._common.differ:
            self._common.settle()

    @contextmanager
    def shared_weights(self) -> Iterator[None]:
        """Let the model hold the ranks' average; its own weights come back afterwards, bit for bit.

        Inside, nothing may train or load weights.
        """
        if self._is_shared:
            yield
            return
        self._assemble("shared_weights()")
        own = {parameter: parameter.detach().clone() for parameter in self._common.of} if self._common.differ else {}
        try:
            if own:
                for parameter, new in self._common.average().items():
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
        self._common.begin_anew()

    def whole_state(self) -> dict[str, Any]:
        """As of every replica, with the ranks' average."""
        with self.shared_weights():
            return super().whole_state()

    def load_whole_state(self, state: dict[str, Any]) -> None:
        """As of every replica; the next exchange is due as if this had been one."""
        self._refuse_inside("loading a state")
        super().load_whole_state(state)
        self._common.begin_anew()

    def rank_state(self) -> dict[str, Any]:
        """This rank's own weights and optimizer state, and what all have in common; every rank must call it.

        An exchange that is under way is waited for, and not taken in before its step.
        """
        names = {p: name for name, p in plain_names(self.module).items() if p in self._common.of}
        return {
            **self._common.state(names, self._aside),
            "group": self._leaders[self._backend.rank],
            "unsent": {}
            if self._not_sent is None
            else self._not_sent.state(((n, p) for p, n in names.items()), speaks=self._speaks[self._backend.rank]),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_rank_states(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Go on as each rank was; on another number of ranks, in other groups, or with another sync, from the common weights."""
        self._refuse_inside("loading a state")
        named = plain_names(self.module)
        say_lost((state for state in states if "rests" in state), "gradients", "with sync=")
        self._take_unsent([state["unsent"] for state in states if state.get("unsent")], named)
        if self._common.go_on(states, named, self._backend.rank, self._leaders):
            self._common.follow(self._parameters)  # those that were not trained then too
            self.optimizer.load_state_dict(states[self._backend.rank]["optimizer"])

    # -- inside -------------------------------------------------------------------------------------------------------

    @property
    def _speaks(self) -> tuple[bool, ...]:
        """Of each rank, whether it sends weights."""
        return tuple(leader == rank for rank, leader in enumerate(self._leaders))

    @property
    def _leaders(self) -> tuple[int, ...]:
        """Of each rank, which one sends its weights."""
        return tuple(range(self._backend.world_size)) if self._together is None else self._together.leaders

    def _refuse_inside(self, what: str) -> None:
        if self._is_shared:
            raise TrainingError(_INSIDE.format(what=what))

    def _assemble(self, what: str) -> None:
        """A rank that has taken other steps, or is elsewhere, would wait in another exchange."""
        self._backend.assemble(f"{what} after step {self._steps}")

    def _take_unsent(self, states: Sequence[Mapping[str, Any]], named: Mapping[str, nn.Parameter]) -> None:
        if self._not_sent is not None:
            self._not_sent.load(states, self._backend.rank, named, self._speaks)
        else:
            say_lost(states, "weights", "without a compression")

    def _way(self, *, beside: bool = False, exactly: bool = False) -> Way:
        under_way = not exactly  # at the end of a step, which is counted after it
        return Way(
            everyone=self._beside if beside else self._backend,
            groups=self._together,
            what=f"exchange of weights after step {self._steps + under_way}",
            names=self._named,
            compression=None if exactly else self.options.compression,
            unsent=None if exactly else self._not_sent,
            number=self._number,
            alike=None if exactly or self.options.compression is None else self._alike,
        )


def _scales(scaler: GradScaler | None) -> bool:
    return scaler is not None and scaler.is_enabled()
