"""What a training loop tells objects that users add to it, and how these are saved with the run.

An object has one or more of the methods below, and nothing else is asked of it. Every rank tells its own objects the same, in
the same order, so that they may use the backend; what they do to the model or the optimizer they must do on all ranks.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from hvdtrain.errors import CheckpointError, ConfigError
from hvdtrain.training.plain_state import is_stateful, to_plain

if TYPE_CHECKING:
    from hvdtrain.training.checkpoint import Checkpoints
    from hvdtrain.training.trainer import Trainer

_log = logging.getLogger(__name__)

_EVENTS = ("on_start", "on_step", "on_epoch", "on_evaluation", "on_save")
_METHODS = (*_EVENTS, "inference")


@dataclass(frozen=True, kw_only=True, slots=True)
class StepEvent:
    """An optimizer step has been made.

    Attributes:
        step: Optimizer steps done.
        epoch: Epochs completed.
        samples: Of this step, over all ranks.
        skipped: The gradient was not finite, and nothing was updated.
    """

    step: int
    epoch: int
    samples: int
    skipped: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class EpochEvent:
    """An epoch has been completed; it is evaluated and saved after this.

    Attributes:
        step: Optimizer steps done.
        epoch: Epochs completed.
        train_loss: Mean over the epoch.
    """

    step: int
    epoch: int
    train_loss: float


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationEvent:
    """An evaluation of `Trainer.fit` has been made; a checkpoint is written after this.

    Attributes:
        step: Optimizer steps done.
        epoch: Epochs completed.
        metrics: The same on every rank.
        regular: False for one that is made only because the run ends here: a run that goes on from this place should be
            as if it had not been made.
    """

    step: int
    epoch: int
    metrics: Mapping[str, float]
    regular: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class SaveEvent:
    """A checkpoint has been written (or, by `hvdtrain.AsyncCheckpoints`, is being written).

    Attributes:
        step: Optimizer steps done.
        path: Its folder, as rank 0 has it.
    """

    step: int
    path: str


class Callback(Protocol):
    """An object to be given to ``Trainer(callbacks=[...])``: any of these methods.

    With `state_dict` and `load_state_dict` besides, rank 0's state is saved in every checkpoint, and loaded on every rank before
    `on_start`, into the object of the same class, or of the same text ``state_name`` if it has one; several of one name are
    numbered. To end the run after the current step or evaluation, call ``trainer.stop(reason)``.
    """

    def on_start(self, trainer: Trainer) -> None:
        """`Trainer.fit` begins, or goes on: all that a checkpoint holds has been loaded."""

    def on_step(self, trainer: Trainer, event: StepEvent) -> None:
        """An optimizer step has been made. To look at a tensor on a GPU waits for it."""

    def on_epoch(self, trainer: Trainer, event: EpochEvent) -> None:
        """An epoch has been completed."""

    def on_evaluation(self, trainer: Trainer, event: EvaluationEvent) -> None:
        """An evaluation has been made."""

    def on_save(self, trainer: Trainer, event: SaveEvent) -> None:
        """A checkpoint has been written; what changes here is not in it."""

    def inference(self, trainer: Trainer) -> AbstractContextManager[None]:
        """Return what is entered around every evaluation and prediction."""


class Events:
    """Tells a Trainer's callbacks what happens.

    Args:
        callbacks: See `Callback`.

    Attributes:
        described: Their names, for comparing over the ranks.
        stop_reason: Why this rank's callbacks want the run to end; "" if they do not.

    Raises:
        ConfigError: One of them has no method of a callback, or one that is never called.
    """

    def __init__(self, callbacks: Sequence[object]) -> None:
        self._callbacks = _named(callbacks)
        self.described = list(self._callbacks)
        self.stop_reason = ""
        self._methods = {
            method: [getattr(one, method) for one in self._callbacks.values() if callable(getattr(one, method, None))]
            for method in _METHODS
        }
        self._beside: list[Checkpoints] = []  # of callbacks, in folders of their own
        self._telling = False
        self._later: list[Callable[[], object]] = []

    def __bool__(self) -> bool:
        return bool(self._callbacks)

    def started(self, trainer: Trainer) -> None:
        """`fit` begins or goes on."""
        self.stop_reason = ""
        self._tell("on_start", trainer)

    def stepped(self, trainer: Trainer, samples: int, *, skipped: bool) -> None:
        """A step has been made, of so many samples over all ranks."""
        if self._methods["on_step"]:
            at = trainer.position
            self._tell("on_step", trainer, StepEvent(step=at.steps, epoch=at.epoch, samples=samples, skipped=skipped))

    def finished_epoch(self, trainer: Trainer) -> None:
        """An epoch has been completed."""
        at = trainer.position
        self._tell("on_epoch", trainer, EpochEvent(step=at.steps, epoch=at.epoch, train_loss=at.train_loss))

    def evaluated(self, trainer: Trainer, *, regular: bool) -> None:
        """`fit` has evaluated."""
        at = trainer.position
        metrics = dict(at.eval_metrics)
        done = EvaluationEvent(step=at.steps, epoch=at.epoch, metrics=metrics, regular=regular)
        self._tell("on_evaluation", trainer, done)

    def saved(self, trainer: Trainer, path: str) -> None:
        """`fit` has written a checkpoint."""
        self._tell("on_save", trainer, SaveEvent(step=trainer.position.steps, path=path))

    def when_all_are_told(self, do: Callable[[], object]) -> None:
        """Do something at once, or, if one of the callbacks asks for it, when the others know what it knows."""
        if self._telling:
            self._later.append(do)
        else:
            do()

    def keep_apart(self, checkpoints: Checkpoints, own: Checkpoints | None) -> None:
        """Note where a callback writes checkpoints; see `Trainer.keep_apart`."""
        place = os.path.realpath(checkpoints.folder)
        for other in (own, *self._beside):
            if other is not None and other is not checkpoints and os.path.realpath(other.folder) == place:
                raise ConfigError(
                    f"{checkpoints.folder} is the folder of other checkpoints of this run; give a folder for each"
                )
        self._beside.append(checkpoints)

    @contextmanager
    def inference(self, trainer: Trainer) -> Iterator[None]:
        """Surround an evaluation or a prediction."""
        with ExitStack() as stack:
            if self._methods["inference"]:
                trainer.replica.sync_buffers()  # those that training goes on with, whatever stands in for them meanwhile
            for method in self._methods["inference"]:
                context = method(trainer)
                if not isinstance(context, AbstractContextManager):
                    raise ConfigError(
                        f"{method.__qualname__} must return a context manager, and returned a {type(context).__name__}; write it with one yield, "
                        "under @contextlib.contextmanager"
                    )
                stack.enter_context(context)
            yield

    def _tell(self, event: str, trainer: Trainer, *about: object) -> None:
        """Call a method of all that have it, in their order, and then do what they put off."""
        self._telling = True
        try:
            for method in self._methods[event]:
                method(trainer, *about)
        finally:
            self._telling, later, self._later = False, self._later, []
        for do in later:
            do()

    # -- state --------------------------------------------------------------------------------------------------------

    @property
    def stateful(self) -> dict[str, Any]:
        """Those that are saved, by name."""
        return {name: one for name, one in self._callbacks.items() if is_stateful(one)}

    def state_dict(self) -> dict[str, Any]:
        """Return the callbacks' states."""
        return {name: one.state_dict() for name, one in self.stateful.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the callbacks go on; one that was not there begins anew."""
        for name, one in self.stateful.items():
            if name in state:
                one.load_state_dict(state[name])
            else:
                _log.warning("the checkpoint holds nothing of the callback %s, which begins anew", name)

    def known(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Return what a saved state holds of these callbacks."""
        for name in [name for name in state if name not in self.stateful]:
            _log.warning("what the checkpoint holds of a callback %s is left out: this run has none", name)
        return {name: value for name, value in state.items() if name in self.stateful}

    def check_savable(self) -> None:
        """Refuse at once what the first checkpoint would fail at.

        Raises:
            ConfigError: A state cannot be saved.
        """
        for name, one in self.stateful.items():
            try:
                to_plain(one.state_dict(), f"the state of the callback {name}")
            except CheckpointError as error:
                raise ConfigError(f"{error}; or train without checkpoints") from error


def _named(callbacks: Sequence[object]) -> dict[str, Any]:
    """The callbacks by what their states are called, numbered where several are called the same."""
    if not isinstance(callbacks, list | tuple):
        raise ConfigError(f"callbacks must be a list of objects, got a {type(callbacks).__name__}")
    named: dict[str, Any] = {}
    of_name: Counter[str] = Counter()
    for one in callbacks:
        kind = type(one).__name__
        if isinstance(one, type):
            raise ConfigError(f"callbacks holds the class {one.__name__}; give an object of it, {one.__name__}(...)")
        if any(one is other for other in named.values()):
            raise ConfigError(
                f"callbacks holds the same {kind} twice, which would be told everything twice; leave one out"
            )
        unknown = [
            name for name in dir(one) if name.startswith("on_") and name not in _EVENTS and callable(getattr(one, name))
        ]
        if unknown or not any(callable(getattr(one, method, None)) for method in _METHODS):
            what = f"{unknown[0]}, which is never called" if unknown else "no method that is ever called"
            raise ConfigError(f"the callback {kind} has {what}; a callback has one or more of {', '.join(_METHODS)}")
        name = str(getattr(one, "state_name", kind))
        of_name[name] += 1
        named[name if of_name[name] == 1 else f"{name} {of_name[name]}"] = one
    return named
