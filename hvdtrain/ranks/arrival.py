"""How a rank comes to the others, beside any engine: it finds them, is watched from then on, and says so if it cannot stay."""

from __future__ import annotations

import atexit
import socket
from collections.abc import Callable, Mapping, Sequence

from hvdtrain.errors import HvdtrainError, LaunchError, RankFailure
from hvdtrain.launch.detect import Detection
from hvdtrain.launch.siblings import Siblings
from hvdtrain.ranks import last_words
from hvdtrain.ranks.everyone import assemble
from hvdtrain.ranks.rendezvous import Announce, Meeting, meet
from hvdtrain.ranks.watch import NullWatch, Watch

_ENDED_BEFORE = (
    "ended before it came to hvdtrain.init(): no process of it is left. Its own output, above, may say why; an exit code of 0 "
    "tells a launcher nothing"
)


class Arrival:
    """One rank's way to a running job.

    Args:
        detection: Who this rank is, and where the others may be.
        timeout_s: How long to wait for them, in seconds.

    Attributes:
        meeting: With the others; None before `meet`.
        watch: Over all ranks, from the moment in which this one found rank 0; of a world of one there is none.
    """

    def __init__(self, detection: Detection, timeout_s: float) -> None:
        self._detection, self._timeout_s = detection, timeout_s
        self._rank, self._world_size = detection.topology.rank, detection.topology.world_size
        self._siblings: Siblings | None = None
        self.meeting: Meeting | None = None
        self.watch: NullWatch = NullWatch()

    def meet(
        self, announce: Announce | None, software: Callable[[], Mapping[str, str]], on_failure: Callable[[], None]
    ) -> Meeting:
        """Connect with the other ranks, begin to watch them, and return when all are here.

        Args:
            announce: How rank 0's address can reach ranks on other hosts; None: only through a folder that they share.
            software: Gives names and versions that must be the same on every rank.
            on_failure: Called when some rank has failed, before this one ends.

        Raises:
            LaunchError: Some rank did not come in time or never will, or has other software.
        """
        siblings = self._siblings = Siblings(self._detection)
        self.meeting = meeting = meet(
            self._detection, self._timeout_s, announce, lambda: self._look_for_rank_zero(siblings)
        )
        if self._world_size > 1:
            watch = self.watch = Watch(meeting.store, self._rank, self._world_size)
            watch.on_failure.append(lambda _: on_failure())
            watch.start()
        assemble(
            meeting.store, self.watch, dict(software()),
            rank=self._rank, world_size=self._world_size, timeout_s=self._timeout_s,
            look=lambda awaited: self._look_for(awaited, siblings),
        )  # fmt: skip
        meeting.all_met()
        return meeting

    def give_up(self, error: BaseException) -> None:
        """Let the others know that this rank could not start, because of ``error``."""
        if self._siblings is not None and self._world_size > 1:
            atexit.register(self._siblings.end_stopped)  # what nobody caught is printed before
        if self.meeting is None:
            return
        victim_of = last_words.conclude(error, self.watch)
        self.meeting.all_met()
        if victim_of is not None:
            last_words.end_as_victim(victim_of)
        if isinstance(error, HvdtrainError):
            error.first = True

    def _look_for(self, awaited: Sequence[int], siblings: Siblings) -> None:
        """Tell all, and raise, if one of the ranks that have not come never will."""
        for rank in siblings.ended(awaited):
            failure = self.watch.words.report_death(rank, socket.gethostname(), _ENDED_BEFORE)
            if failure is not None:
                raise failure.error()

    def _look_for_rank_zero(self, siblings: Siblings) -> None:
        """Raise if rank 0 never comes. Without it the others have nobody to tell, so the first of them speaks."""
        if not siblings.ended([0]):
            return
        if self._rank == min(siblings.alive(), default=self._rank):
            raise LaunchError(f"rank 0 on {socket.gethostname()} {_ENDED_BEFORE}")
        last_words.end_as_victim(RankFailure(_ENDED_BEFORE, rank=0))
