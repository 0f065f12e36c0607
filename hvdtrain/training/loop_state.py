"""What a training loop must remember to go on exactly where it was, in one place, for the Trainer's loop and for yours.

Model, optimizer, schedule, gradient scaler, the random numbers of every rank, the position in the data, and whatever else
has a state. It is written as one checkpoint (`hvdtrain.training.checkpoint`); nothing is pickled.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hvdtrain.backends.base import Backend
from hvdtrain.backends.layout import lay_out_states
from hvdtrain.backends.replica import Replica
from hvdtrain.backends.units import state_for_rank_zero, whole
from hvdtrain.data.random_numbers import untouched_random_numbers
from hvdtrain.errors import CheckpointError, ConfigError
from hvdtrain.training.checkpoint import Checkpoints, Loaded, agree, fill, load, model_state
from hvdtrain.training.checkpoint_files import Saved
from hvdtrain.training.events import Events
from hvdtrain.training.inference import modes_kept
from hvdtrain.training.plain_state import from_plain, is_stateful, to_plain
from hvdtrain.training.random_numbers import random_state, set_random_state
from hvdtrain.training.schedules import describe

if TYPE_CHECKING:
    from torch.amp.grad_scaler import GradScaler

_log = logging.getLogger(__name__)

_MISFITS = (
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    IndexError,
    RuntimeError,
    OverflowError,
)  # of foreign states
_PACED = ("lr", "momentum", "betas")  # what schedules change
_OWN = ("optimizer", "schedule", "precision", "kinds", "callbacks")  # names in a checkpoint that are not the user's
_REPLICA = "replica:"  # and a replica's name, in a rank's own state


@runtime_checkable
class Stateful(Protocol):
    """Anything whose state can be saved and continued."""

    def state_dict(self) -> Mapping[str, Any]:
        """Return the state."""
        ...

    def load_state_dict(self, state: Any) -> Any:
        """Continue from a state."""
        ...


class LoopState:
    """A loop's state, to be saved and loaded; see examples/own_loop_resume.py.

    Args:
        backend: A running backend.
        replica: Its model and its optimizer, if it has one, are saved.
        schedule: A learning-rate scheduler.
        scaler: A GradScaler.
        callbacks: The Trainer's. What a checkpoint does not hold of them begins anew.
        others: More that has `state_dict` and `load_state_dict`, by names of your choice: a loader of `Backend.loader`, whose
            position in the data is saved, an average of the model, another `Replica`. Rank 0's is saved, and loaded on
            every rank.

    Raises:
        ConfigError: An argument has no state, or a name is taken.
    """

    def __init__(
        self,
        backend: Backend,
        replica: Replica,
        *,
        schedule: Any = None,
        scaler: GradScaler | None = None,
        callbacks: Events | None = None,
        **others: Stateful | Replica,
    ) -> None:
        for name, value in others.items():
            if name in _OWN:
                raise ConfigError(f"{name!r} is the name of a part of every checkpoint; choose another")
            if not isinstance(value, Replica) and not is_stateful(value):
                raise ConfigError(f"{name}={type(value).__name__} has no state_dict and load_state_dict to be saved by")
        self._backend = backend
        if scaler is not None:
            replica.expect_scaler(scaler)
        self._replica = replica
        self._schedule = schedule
        self._scaler = scaler
        self._callbacks = callbacks
        self._others = others
        self._last: str | None = None  # the checkpoint that was written last, or gone on from

    def save(
        self,
        checkpoints: Checkpoints,
        step: int,
        *,
        of_this_rank: Mapping[str, Any] | None = None,
        last: str | None = "",
    ) -> str:
        """Write a checkpoint; every rank must call it at the same place of its loop.

        Args:
            checkpoints: Where to.
            step: Optimizer steps done; names the checkpoint.
            of_this_rank: More of this rank's own, for `read`.
            last: For a folder beside the one that this loop goes on in: the checkpoint that it wrote there last, None if none.

        Returns:
            The checkpoint's folder.

        Raises:
            CheckpointError: On every rank: it could not be written, or holds what cannot be saved.
        """
        self._backend.assemble(f"saving a checkpoint of step {step}")
        of_replicas = self._of_this_rank()
        with ExitStack() as stack:
            for one in self._replicas().values():
                stack.enter_context(one.shared_weights())
            path = checkpoints.save(
                self._backend,
                step=step,
                model=whole(model_state(self._replica.module, cut=True), root=self._backend.rank == 0),
                training={name: self._plain(name, part) for name, part in self._parts().items()}
                | {"kinds": self._kinds()},
                rank_state={
                    "random": random_state(),
                    **of_replicas,
                    **to_plain(dict(of_this_rank or {}), "of_this_rank"),
                },
                last=self._last if last == "" else last,
            )
        if last == "":
            self._last = path
        return path

    def load(
        self, which: Checkpoints | Saved | Path | str | None, rehearsal: Callable[[nn.Module], Tensor] | None = None
    ) -> int:
        """Go on from a checkpoint, if there is one; every rank must call it.

        On as many ranks as it was written by all goes on exactly; on another number random numbers begin anew.

        Args:
            which: The newest of these checkpoints, or the folder of one. None, or no checkpoint there, changes nothing.
            rehearsal: Returns a loss of the model that it is given, as a training step computes it, on any batch of at least
                one sample a rank. It is called once, without effect, if something was loaded. Some engines decide in their
                first step how gradients lie in what they send; without it a sum over three or more ranks may round
                differently than it would have without the interruption.

        Returns:
            Optimizer steps done: 0 if nothing was loaded.

        Raises:
            CheckpointError: On every rank: damaged, or of another model, optimizer or schedule.
        """
        loaded = self.read(which)
        if loaded is None:
            return 0
        if rehearsal is not None:
            rehearse(self._replica, rehearsal)
        return loaded.step

    def read(self, which: Checkpoints | Saved | Path | str | None) -> Loaded | None:
        """Do what `load` does, and return all that the checkpoint holds, each rank's ``of_this_rank`` included."""
        backend, replica = self._backend, self._replica
        if isinstance(which, Checkpoints):
            which = which.find(backend)
        apart: dict[str, Any] | None = {} if replica.is_cut else None
        loaded = load(backend, which, replica.module, apart)
        if loaded is None:
            return None
        self._check_kinds(loaded)
        if apart is not None:
            replica.load_whole_state({"model": apart["model"]} if apart else {})
        for name, part in self._parts().items():
            self._continue(loaded, name, part, apart)
        replica.copy_from_rank_zero()
        for name, one in self._replicas().items():
            of_ranks = [
                from_plain(state.pop(_REPLICA + name, {}), None, "a rank's own") for state in loaded.rank_states
            ]
            try:
                one.load_rank_states(of_ranks)
            except _MISFITS as error:
                raise CheckpointError(
                    f"{loaded.path}: what it says of each rank's replica cannot be used: {error!r}"
                ) from error
        self._last = loaded.path
        if len(loaded.rank_states) == backend.world_size:
            try:
                set_random_state(loaded.rank_states[backend.rank]["random"])
            except _MISFITS as error:
                raise CheckpointError(
                    f"{loaded.path}: what it says of rank {backend.rank}'s random numbers cannot be used: {error!r}"
                ) from error
        else:
            _log.info(
                "the checkpoint is of %d ranks, this run has %d: random numbers begin anew",
                len(loaded.rank_states),
                backend.world_size,
            )
        everyone = [from_plain(state, None, "of_this_rank") for state in loaded.rank_states]
        return replace(loaded, rank_states=everyone)

    # -- inside -------------------------------------------------------------------------------------------------------

    def _parts(self) -> dict[str, Any]:
        """What is saved of rank 0, by name; None for what this loop does not have."""
        return {
            "optimizer": _optimizer(self._replica),
            "schedule": self._schedule,
            "precision": self._scaler,
            **({} if self._callbacks is None else {"callbacks": self._callbacks}),
            **self._others,
        }

    def _replicas(self) -> dict[str, Replica]:
        return {"": self._replica, **{name: part for name, part in self._others.items() if isinstance(part, Replica)}}

    def _of_this_rank(self) -> dict[str, Any]:
        """What only this rank knows of each replica."""
        states = {name: one.rank_state() for name, one in self._replicas().items()}
        return {_REPLICA + name: to_plain(state, "a rank's own") for name, state in states.items() if state}

    def _kinds(self) -> dict[str, str]:
        optimizer = _optimizer(self._replica)
        return {
            "optimizer": "" if optimizer is None else getattr(optimizer, "kind", type(optimizer).__name__),
            "schedule": "" if self._schedule is None else describe(self._schedule),
        }

    def _plain(self, name: str, part: Any) -> Any:
        if part is None:
            return None
        plain = to_plain(_state(part), f"the {name}'s state", kept=(_optimizer(self._replica), self._schedule))
        return whole(plain, root=self._backend.rank == 0)

    def _check_kinds(self, loaded: Loaded) -> None:
        saved, own = loaded.training.get("kinds", {}), self._kinds()
        for name, kind in own.items():
            if saved.get(name, kind) == kind:
                continue
            if not (kind and saved[name]):
                _log.warning(
                    "%s was written with %s %s, and this run has %s: %s",
                    loaded.path,
                    name,
                    saved[name] or "none",
                    kind or "none",
                    "it begins anew" if kind else "what was saved of it is left out",
                )
                continue
            raise CheckpointError(
                f"{loaded.path} was written with {name} {saved[name]}, and this run has {kind}: use the same, or --resume never"
            )

    def _continue(self, loaded: Loaded, name: str, part: Any, apart: dict[str, Any] | None) -> None:
        state = loaded.training.get(name)
        if part is None:
            return
        if name in _OWN and not state:
            if isinstance(part, Events):
                part.load_state_dict({})  # says what begins anew
            return
        if name not in loaded.training:
            raise CheckpointError(
                f"{loaded.path} was written by another loop: it has no {name!r}, but "
                f"{', '.join(sorted(set(loaded.training) - {'kinds'}))}"
            )
        try:
            own_options = _options(part) if name == "optimizer" else []
            if isinstance(part, Events):
                state = part.known(state or {})
            if name == "optimizer" and apart is not None:
                self._load_cut(loaded.path, apart)
            else:
                _load(part, from_plain(state, _state(part), f"the {name}'s state"))
            if name == "optimizer":
                self._check_options(loaded, part, own_options)
        except _MISFITS as error:
            raise CheckpointError(
                f"{loaded.path} was written with another {name}: {type(error).__name__}: {error}; use the same, or --resume never"
            ) from error

    def _load_cut(self, path: str, apart: dict[str, Any]) -> None:
        """Give every rank its part of the optimizer's state, which rank 0 has."""

        found: dict[str, Any] = {}

        def read() -> None:
            try:
                own = _state(self._replica.optimizer)
                found["optimizer"] = from_plain(apart["optimizer"], own, "the optimizer's state")
            except _MISFITS as error:
                raise CheckpointError(f"{path} was written with another optimizer: {error!r}") from error

        agree(self._backend, read)
        self._replica.load_whole_state(found)

    def _check_options(self, loaded: Loaded, optimizer: Optimizer, own: list[dict[str, Any]]) -> None:
        """What each group of parameters was given: the checkpoint's go on, as torch has it, and a difference is said."""
        paced = () if self._schedule is None else _PACED
        different = {}
        for group, before in zip(optimizer.param_groups, own, strict=True):
            for option, value in before.items():
                if option not in group and option in optimizer.defaults:
                    raise KeyError(f"its parameters have no {option!r}")
                now = group.setdefault(option, value)  # what a schedule keeps there
                if option in optimizer.defaults and option not in paced and repr(now) != repr(value):
                    different[option] = f"{option}={now} (and not {value})"
        if different:
            _log.warning(
                "%s: the optimizer goes on with %s, as it was saved", loaded.path, ", ".join(different.values())
            )


def rehearse(replica: Replica, forward: Callable[[nn.Module], Tensor]) -> None:
    """Run one forward and backward pass for the engine's sake, and leave everything as it was; every rank must call it.

    Args:
        replica: Not in the middle of a step.
        forward: Returns a loss of the model that it is given.
    """
    with left_as_it_was(replica.module):
        replica.rehearse(forward)


@contextmanager
def left_as_it_was(module: nn.Module) -> Iterator[None]:
    """Let a module compute in training mode; its buffers and all random numbers are afterwards as before."""
    buffers = [buffer.clone() for buffer in module.buffers()]
    with modes_kept(module), untouched_random_numbers():
        module.train()
        yield
    with torch.no_grad():
        for buffer, before in zip(module.buffers(), buffers, strict=True):
            buffer.copy_(before)


def _optimizer(replica: Replica) -> Optimizer | None:
    try:
        return replica.optimizer
    except ConfigError:
        return None


def _options(optimizer: Optimizer) -> list[dict[str, Any]]:
    return [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]


def _state(part: Any) -> Any:
    if isinstance(part, Replica):
        optimizer = _optimizer(part)
        model = model_state(part.module, cut=True)
        return {"model": model, "optimizer": None if optimizer is None else state_for_rank_zero(optimizer)}
    if isinstance(part, Optimizer):
        return state_for_rank_zero(part)
    return model_state(part) if isinstance(part, nn.Module) else part.state_dict()


def _load(part: Any, state: Any) -> None:
    if isinstance(part, Replica) and part.is_cut:
        part.load_whole_state({name: of for name, of in state.items() if of is not None})
    elif isinstance(part, Replica):
        fill(part.module, state["model"], "the checkpoint")
        optimizer = _optimizer(part)
        if optimizer is not None and state["optimizer"] is not None:
            optimizer.load_state_dict(state["optimizer"])
    elif isinstance(part, nn.Module):
        fill(part, state, "the checkpoint")
    else:
        part.load_state_dict(state)
        if isinstance(part, Optimizer):  # which no replica need have
            lay_out_states(part)
