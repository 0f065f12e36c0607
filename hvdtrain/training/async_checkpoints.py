"""Checkpoints that are written while training goes on.

What blocks is the copy to host memory; a thread of rank 0 writes it, by the same way as ever: beside, flushed, renamed. One
is written at a time, and the next waits for it. None of them fails in silence: a failure is raised, on all ranks, where they
talk next (about once a second in `Trainer.fit`), at the next checkpoint, or when the run ends. The end of the process waits
for the last one, and so does whoever reads checkpoints here.
"""

from __future__ import annotations

import atexit
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from hvdtrain.errors import CheckpointError
from hvdtrain.training.checkpoint import Checkpoints, Ranks
from hvdtrain.training.checkpoint_files import Content, Saved, name_of
from hvdtrain.training.host_copy import HostCopy

_log = logging.getLogger(__name__)

_SAID_S = 1.0  # a wait that is worth a word


class AsyncCheckpoints(Checkpoints):
    """`Checkpoints` whose `save` returns when the state has been copied, and whose `settle` knows how writing went.

    Args:
        folder, keep: As for `Checkpoints`.
        wait_s: The longest wait for one to be written, in seconds, where there is nothing else to do: at the next one, at the
            end, and when the run is asked to stop.
        options: As for `Checkpoints`.
    """

    def __init__(self, folder: Path | str, keep: int = 3, *, wait_s: float = 600.0, **options: Any) -> None:
        super().__init__(folder, keep, **options)
        self._wait_s = wait_s
        self._memory = HostCopy()
        self._writing: _Writing | None = None

    def save(
        self,
        ranks: Ranks,
        *,
        step: int,
        model: Mapping[str, Tensor],
        training: Mapping[str, Any],
        rank_state: Mapping[str, Any],
        last: str | None = "",
    ) -> str:
        """Copy the state and have it written; every rank must call it.

        Arguments and result are those of `Checkpoints.save`; the folder that is returned is there when `settle` has returned.

        Raises:
            CheckpointError: On every rank, if rank 0 could not write the one before, or has no memory for the copy.
        """
        everyone = ranks.all_gather_object(dict(rank_state))
        problem = ""
        if ranks.rank == 0:
            problem = self._outcome()
            try:
                if not problem:
                    self._begin(step, model, training, everyone, last)
            except (RuntimeError, MemoryError) as error:
                problem = f"no copy could be made of the state of step {step}: {error}"
        problem = ranks.broadcast_object(problem)
        if problem:
            raise CheckpointError(problem)
        return str(self.folder / name_of(step))

    def failed(self) -> bool:
        """Whether writing has failed, on rank 0; the others cannot know."""
        return self._writing is not None and self._writing.problem != ""

    def settle(self, ranks: Ranks) -> None:
        """Wait for what is being written; every rank must call it.

        Raises:
            CheckpointError: On every rank: it could not be written, or not in time.
        """
        problem = ranks.broadcast_object(self._outcome() if ranks.rank == 0 else "")
        if problem:
            raise CheckpointError(problem)

    def latest(self) -> Saved | None:
        """Wait for what is being written, and do as `Checkpoints.latest`."""
        self._wait()
        return super().latest()

    def begin(self, going_on_from: Saved | None, beside: Sequence[Path] = ()) -> str:
        """Wait for what is being written, and do as `Checkpoints.begin`."""
        self._wait()
        return super().begin(going_on_from, beside)

    def release(self) -> None:
        """Wait for what is being written, and do as `Checkpoints.release`."""
        self._wait()
        super().release()

    # -- inside -------------------------------------------------------------------------------------------------------

    def _begin(
        self,
        step: int,
        model: Mapping[str, Tensor],
        training: Mapping[str, Any],
        everyone: list[Any],
        last: str | None,
    ) -> None:
        tensors, states, ranks = self._memory.of(model, training, everyone)
        content = Content(step=step, model=tensors, training=states, ranks=ranks, settings=self._settings)
        self._writing = _Writing(self, content, last)
        self._writing.start()

    def _wait(self) -> bool:
        """Wait for what is being written, not for ever; whether nothing is any more."""
        writing = self._writing
        if writing is None:
            return True
        began = time.monotonic()
        writing.join(self._wait_s)
        waited_s = time.monotonic() - began
        if waited_s > _SAID_S:
            _log.info("waited %.1f s for the checkpoint of step %d to be written", waited_s, writing.step)
        return not writing.is_alive()

    def _outcome(self) -> str:
        """How writing the last one went, on rank 0: "" if it went well; a failure is told once."""
        done, writing = self._wait(), self._writing
        if writing is None:
            return ""
        if not done:
            return (
                f"the checkpoint of step {writing.step} is still being written after {self._wait_s:g} s, which is too long to wait "
                f"for it in {self.folder}; earlier ones are unharmed. Save less often, to a faster disk, or without "
                "--checkpoint-async"
            )
        self._writing = None
        return writing.problem


class _Writing(threading.Thread):
    """Writes one checkpoint. The end of the process waits for it, within bounds: so it is a daemon with a handler at exit."""

    def __init__(self, checkpoints: AsyncCheckpoints, content: Content, last: str | None) -> None:
        super().__init__(name=f"checkpoint-{content.step}", daemon=True)
        self.step = content.step
        self.problem = ""
        self._checkpoints, self._content, self._last = checkpoints, content, last

    def start(self) -> None:
        atexit.register(self._checkpoints._wait)
        super().start()

    def run(self) -> None:
        try:
            self._checkpoints.write(self._content, self._last)
        except CheckpointError as error:
            self.problem = str(error)
        except BaseException as error:
            self.problem = f"could not write the checkpoint of step {self.step}: {type(error).__name__}: {error}"
        finally:
            del self._content
            atexit.unregister(self._checkpoints._wait)
