"""How one group's operations begin: in the thread of a caller that waits, where that is quick, or else in the lane's.

Both ask first whether all ranks call the same (`Agreement`). A caller's thread looks for a moment whether the others have come,
and leaves the rest to the lane if they have not. It may be interrupted anywhere (Ctrl-C, which a script may catch): before it has
asked, nothing has happened; after that the lane goes on with what the other ranks count on, or, where that cannot be, takes no
more operations.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
from mpi4py import MPI
from torch import Tensor

from hvdtrain.mpi.agreement import Agreement, Ride, digest, over_within
from hvdtrain.mpi.lane import Lane, MpiWork
from hvdtrain.mpi.staging import Staging
from hvdtrain.ranks.watch import NullWatch

_AT_ONCE_BYTES = 2**14  # up to which a caller that waits makes the MPI calls itself
_PATIENCE_S = 0.0001  # for how long it looks whether the other ranks have come
_PATIENCE_S_PER_BYTE = 3e-10  # and more than that for what it does then is slow
_MOST_BY_LANE = 256
_MOST_PASSAGES = 512

# How far a caller's own thread has come with an operation.
_BEGUN, _ASKED, _PERFORMING, _OVER = range(4)

_DONE = MpiWork("an operation that was over when its call returned", (), 0.0)
_DONE.finish()

Passage = tuple[Ride | None, Callable[[Tensor], None] | None, str, int]


class Submitting:
    """Begins the operations of one group.

    Args:
        lane: The group's.
        agree: Compares operations over the ranks; None where nothing is compared.
        watch: Told of what is begun and waited for.
        label: Of the group, for the watch.
        ranks: The ranks in the world.
        timeout_s: Of operations that say none.
        staging: Brings tensors to where MPI reads and writes them.

    Attributes:
        asked: Operations of which the other ranks have been told.
        coalescing: Operations of a block that are started as one; None outside such a block.
    """

    def __init__(
        self,
        lane: Lane,
        agree: Agreement | None,
        watch: NullWatch,
        label: str,
        ranks: Sequence[int],
        timeout_s: float,
        staging: Staging,
    ) -> None:
        self._lane, self._agree, self._watch, self._label = lane, agree, watch, label
        self._ranks, self._timeout_s, self._staging = list(ranks), timeout_s, staging
        self._over = f" over {label} ({len(self._ranks)} ranks)"
        self._process = os.getpid()
        self._by_lane = self._slow = 0
        self._passages: dict[tuple[Any, ...], Passage] = {}  # of small operations that were made before
        self.asked = 0
        self.coalescing: list[MpiWork] | None = None

    # -- the shortest way ---------------------------------------------------------------------------------------------

    def remember(self, key: tuple[Any, ...], nbytes: int, passage: Passage) -> None:
        """Let `ride` perform operations like one, if it is small.

        Args:
            key: By which `ride` finds it.
            nbytes: Of what is written.
            passage: How it rides, or what is done to its output once all agree; for messages; what must be equal on all ranks.
        """
        if self._agree is not None and nbytes <= _AT_ONCE_BYTES and len(self._passages) < _MOST_PASSAGES:
            self._passages[key] = passage

    def ride(self, key: tuple[Any, ...], tensor: Tensor, out: Tensor, opts: Any) -> MpiWork | None:
        """The shortest way: an operation like one before, small, whose caller waits, of an idle group; None if it is not that."""
        passage, agree, lane = self._passages.get(key), self._agree, self._lane
        if passage is None or agree is None or self.coalescing is not None or getattr(opts, "asyncOp", True):
            return None
        if not (_lies_plainly(tensor) and (out is tensor or _lies_plainly(out))) or os.getpid() != self._process:
            return None
        ride, after, what, asked = passage
        finish = after if ride is None else ride.arrive
        assert finish is not None
        stage, me, before = _BEGUN, threading.get_ident(), math.inf
        try:
            if not self._enter():
                return None
            before = self.asked
            began = time.perf_counter()
            self._watch.count(self._label)
            if ride is not None:
                ride.board(tensor)
            self.asked += 1
            request = agree.begin(asked, self.asked)
            stage = _ASKED
            if not (over_within(request, _PATIENCE_S) and agree.reached()):
                self._note(-math.inf, 0)
                work = self._riding_on(out, opts, request, finish, what)
                stage = _OVER
                return work
            if ride is not None:  # what is left is this rank's alone, and may be done twice
                finish(out)
                stage = _OVER
                self._note(began, 0)
                return _DONE
            work, plain, stage = MpiWork(what + self._over, [out], self.limit(opts)), out.detach(), _PERFORMING
            lane.perform(work, lambda: finish(plain))
            stage = _OVER
            self._note(began, _nbytes(out))
            return work
        except BaseException as error:
            if lane.inside == me:
                if stage == _ASKED:
                    self._riding_on(out, opts, request, finish, what)
                elif stage == _PERFORMING or (stage == _BEGUN and self.asked > before):
                    lane.interrupted(what, error)
            raise
        finally:
            if lane.inside == me:
                lane.inside = None
                lane.left()

    def _riding_on(
        self, out: Tensor, opts: Any, request: MPI.Request, finish: Callable[[Tensor], None], what: str
    ) -> MpiWork:
        """Let the lane wait for the other ranks, or say that they called something else."""
        work = MpiWork(what + self._over, [out], self.limit(opts))

        def complete() -> None:
            self._expect_agreement(work.what)
            finish(out.detach())

        self._wait_in_lane(work, request, complete)
        return work

    # -- any way ------------------------------------------------------------------------------------------------------

    def start(
        self,
        what: str,
        key: tuple[Any, ...],
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor],
        opts: Any,
        run: Callable[[list[Tensor], list[Tensor]], None],
        timeout: timedelta | None = None,
        ride: Ride | None = None,
    ) -> MpiWork:
        """Hand an operation to the lane, or perform it here if the caller waits for it and the lane is idle.

        Args:
            what: For messages.
            key: What must be equal on all ranks.
            inputs: Read.
            outputs: Written; those that are inputs as well are both.
            opts: c10d's options: the time-out, and whether the caller waits.
            run: Is given contiguous CPU versions of both.
            timeout: Instead of that of ``opts``.
            ride: Does what ``run`` does, of the only tensor and to the only one, with the ranks' agreement.
        """
        what += self._over
        work = MpiWork(what, list(outputs) or list(inputs), self.limit(opts, timeout))
        taken = {id(tensor): self._staging.take(tensor) for tensor in inputs}

        def ask() -> MPI.Request | None:
            if self._agree is None:
                return None
            if ride is not None:
                ride.board(taken[id(inputs[0])].host)
            self.asked += 1  # when it is its turn: threads that begin at once may be queued in either order
            return self._agree.begin(digest(key), self.asked)

        def complete() -> None:
            """What is left to do once the question of agreement has been answered."""
            self._expect_agreement(what)
            results = [taken.get(id(out)) or self._staging.room(out) for out in outputs]
            if ride is not None:
                ride.arrive(results[0].host)
            else:
                run([taken[id(tensor)].host for tensor in inputs], [result.host for result in results])
            for result in results:
                self._staging.give_back(result)

        if self._waits_here(opts, inputs, outputs) and self._at_once(work, ask, complete, sum(map(_nbytes, outputs))):
            return work

        def operation() -> None:
            with self._watch.region(self._label, what, self._ranks):
                for staged in taken.values():
                    self._staging.ready(staged)
                request = ask()
                if request is not None:
                    request.Wait()
                complete()

        self._lane.submit(work, operation)
        if self.coalescing is not None:
            self.coalescing.append(work)
        return work

    def limit(self, opts: Any, timeout: timedelta | None = None) -> float:
        """The bound of an operation, in seconds: ``timeout``, that of c10d's options, or the group's."""
        wanted = timeout if timeout is not None else getattr(opts, "timeout", None)
        seconds = wanted.total_seconds() if isinstance(wanted, timedelta) else -1.0
        return seconds if 0 < seconds < math.inf else self._timeout_s

    def _at_once(
        self, work: MpiWork, ask: Callable[[], MPI.Request | None], complete: Callable[[], None], nbytes: int
    ) -> bool:
        """Perform an operation in this thread, if the lane is idle; what would wait is handed over to the lane's.

        Returns:
            Whether it was begun.
        """
        lane, request, stage, me, before = self._lane, None, _BEGUN, threading.get_ident(), math.inf
        try:
            if not self._enter():
                return False
            before = self.asked
            began = time.perf_counter()
            self._watch.count(self._label)
            request = ask()
            stage = _ASKED
            if request is not None and not over_within(request, _PATIENCE_S):
                self._note(began, nbytes)
                self._wait_in_lane(work, request, complete)
                stage = _OVER
                return True
            stage = _PERFORMING
            with torch.no_grad():
                lane.perform(work, complete)
            stage = _OVER
            self._note(began, nbytes)
            return True
        except BaseException as error:
            if lane.inside == me:
                if stage == _ASKED:
                    self._wait_in_lane(work, request, complete)
                elif stage == _PERFORMING or (stage == _BEGUN and self.asked > before):
                    lane.interrupted(work.what, error)
            raise
        finally:
            if lane.inside == me:
                lane.inside = None
                lane.left()

    # -- inside -------------------------------------------------------------------------------------------------------

    def _expect_agreement(self, what: str) -> None:
        if self._agree is not None and not self._agree.reached():
            self._agree.tell_apart(what)

    def _waits_here(self, opts: Any, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> bool:
        """Whether the caller waits at once, and nothing but other ranks could keep it waiting."""
        if opts is None or getattr(opts, "asyncOp", True) or self.coalescing is not None:
            return False
        if self._agree is None and len(self._ranks) > 1:
            return False
        return not any(t.is_cuda for t in (*inputs, *outputs)) and sum(map(_nbytes, outputs)) <= _AT_ONCE_BYTES

    def _enter(self) -> bool:
        """Take the lane for this thread, if that has been quick of late.

        Where ranks are seldom here at the same time, or share cores with others, a thread that sleeps is served sooner than one
        that looks again and again: the more often that was slow, the more operations in a row go by the lane.
        """
        if self._by_lane:
            self._by_lane -= 1
            return False
        return self._lane.enter()

    def _note(self, began: float, nbytes: int) -> None:
        """Note whether an operation that began at ``began`` was quick in this thread."""
        if time.perf_counter() - began > _PATIENCE_S + nbytes * _PATIENCE_S_PER_BYTE:
            self._by_lane = self._slow = min(_MOST_BY_LANE, 2 * self._slow or 1)
        elif self._slow:
            self._slow //= 2

    def _wait_in_lane(self, work: MpiWork, request: MPI.Request | None, complete: Callable[[], None]) -> None:
        def rest() -> None:
            with self._watch.region(self._label, work.what, self._ranks, again=True):
                if request is not None:
                    request.Wait()
                complete()

        self._lane.hand_over(work, rest)


def _lies_plainly(tensor: Tensor) -> bool:
    return (
        tensor.layout == torch.strided
        and not tensor.is_cuda
        and tensor.is_contiguous()
        and not tensor.is_neg()
        and not tensor.is_conj()
    )


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
