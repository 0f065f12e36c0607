"""Where in a stream a rank is, kept so that a run can go on there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hvdtrain.data.portions import Cut, Portion, Start
from hvdtrain.errors import ConfigError


class Place:
    """Where in a stream this rank is, after the steps that were handed out.

    Args:
        cut: Whose share.

    Attributes:
        epoch: Epochs completed.
        samples: Samples of the epoch that are done, over all ranks.
        over: Nothing is left of the epoch.
        again: What was taken up is read a second time, and left out.
    """

    def __init__(self, cut: Cut, epoch: int = 0) -> None:
        self._cut = cut
        self.epoch = epoch
        self._reset()

    def _reset(self) -> None:
        self.samples = 0
        self.over = self.again = self._taken_up = False
        self._taken = [0] * self._cut.readers
        self._states: list[Any] = [None] * self._cut.readers
        self._ended: tuple[int, ...] = ()
        self._turn = 0

    def take(self, epoch: int) -> bool:
        """Whether a place in this epoch was taken up, which can be begun at once."""
        taken, self._taken_up = self._taken_up and epoch == self.epoch, False
        return taken

    def keep(self) -> None:
        """The epoch was begun already when the next iteration asks for it."""
        self._taken_up = True

    def finish(self) -> None:
        """The epoch is done."""
        self._reset()
        self.epoch += 1

    def start(self, *, whole: bool) -> Start:
        """Where the readers begin."""
        if whole:
            state = next((state for state in self._states if state is not None), None)
            readers = self._cut.readers
            return Start(
                epoch=self.epoch,
                at=self.samples,
                skip=() if state is not None else (self.samples,) * readers,
                states=() if state is None else (state,) * readers,
            )
        skip = tuple(0 if state is not None else taken for state, taken in zip(self._states, self._taken, strict=True))
        return Start(epoch=self.epoch, skip=skip, states=tuple(self._states), ended=self._ended, first=self._turn)

    def advance(self, portion: Portion | None, samples: int, ended: tuple[int, ...]) -> None:
        """A step is handed out."""
        self.samples += samples
        self._ended = ended
        if portion is not None:
            self._taken[portion.worker] += portion.samples
            self._states = [None] * len(self._states) if portion.total is not None else self._states
            self._states[portion.worker] = portion.state
            self._turn = (portion.worker + 1) % self._cut.readers

    def state_dict(self) -> dict[str, Any]:
        """Return this rank's."""
        return {
            "epoch": self.epoch,
            "samples": self.samples,
            "over": self.over,
            "global_batch_size": self._cut.global_batch_size,
            "accumulate": self._cut.accumulate,
            "workers": self._cut.workers,
            "turn": self._turn,
            "taken": list(self._taken),
            "states": list(self._states),
            "ended": list(self._ended),
        }

    def take_up(self, everyone: list[Mapping[str, Any]], *, whole: bool) -> None:
        """Go on from the states of all ranks.

        Raises:
            ConfigError: That cannot be.
        """
        first, cut = everyone[0], self._cut
        self.epoch, self.samples, self.over = first["epoch"], first["samples"], first["over"]
        self._taken_up = True
        if self.over or not self.samples:
            return
        before = {"global_batch_size": first["global_batch_size"]}
        now = {"global_batch_size": cut.global_batch_size}
        if not whole:
            before |= {"ranks": len(everyone), "workers": max(1, first["workers"])}
            now |= {"ranks": cut.world_size, "workers": cut.readers}
        differing = [f"{name} {before[name]} (now {now[name]})" for name in before if before[name] != now[name]]
        if differing:
            raise ConfigError(
                f"it is in the middle of a stream, after {self.samples} samples, which was read with {', '.join(differing)}; go on "
                "with the same, or from the end of an epoch"
            )
        states = [state for one in everyone for state in one["states"]]
        if whole:
            self._states = [next((state for state in states if state is not None), None)] * cut.readers
            self.again = self._states[0] is None
            return
        mine = everyone[cut.rank]
        self._turn, self._taken, self._states = mine["turn"], list(mine["taken"]), list(mine["states"])
        self._ended = tuple(mine["ended"])
        self.again = any(s is None and t for one in everyone for s, t in zip(one["states"], one["taken"], strict=True))
