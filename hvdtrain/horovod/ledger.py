"""Who has asked for what: the ranks' requests, matched by name. Pure: nothing here waits or communicates.

Every rank hears the same messages of all ranks in the same order, and so every rank's ledger comes to the same decisions in
the same order. What was agreed once is known by a number from then on, so that a message is a few integers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field

from hvdtrain.horovod.requests import REDUCING, Form

_MOST_KNOWN = 8192  # forms; then all ranks forget all of them at the same moment
JOIN, LEAVE = 1, 2
"""Flags of a message: the sender has joined; the sender wants to end."""
_WITH_JOINED = (*REDUCING, "barrier", "gradients")

Key = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Message:
    """What one rank says in one round.

    Attributes:
        flags: `JOIN` and `LEAVE`.
        known: Requests whose forms all ranks know: the form's number, and the request's own among those without a name.
        unknown: Requests with forms that are new: their text, and the request's number.
        trouble: Why this rank gives up; "" if it does not.
        steps: Of a rank that has joined: how many it has taken of which nobody else was told here.
    """

    flags: int = 0
    known: tuple[tuple[int, int], ...] = ()
    unknown: tuple[tuple[str, int], ...] = ()
    trouble: str = ""
    steps: int = 0

    @property
    def rest(self) -> bytes:
        """What does not fit into integers; b"" if there is nothing."""
        return json.dumps([self.unknown, self.trouble]).encode() if self.unknown or self.trouble else b""

    @classmethod
    def read(cls, flags: int, known: Sequence[tuple[int, int]], rest: bytes, steps: int = 0) -> Message:
        """The message that was sent so."""
        unknown, trouble = json.loads(rest) if rest else ([], "")
        return cls(flags, tuple(known), tuple((text, number) for text, number in unknown), trouble, steps)


@dataclass(frozen=True, slots=True)
class Decision:
    """What all ranks do next.

    Attributes:
        key: The request that it is about.
        form: Its form.
        number: Its number among those without a name.
        absent: Group ranks that take part with nothing, because they have joined.
        error: Why it fails on every rank that asked for it; "" if it is performed.
    """

    key: Key
    form: Form
    number: int
    absent: tuple[int, ...] = ()
    error: str = ""


@dataclass(slots=True)
class Outcome:
    """What a round has come to.

    Attributes:
        decisions: In the order in which they are carried out.
        last_joined: The group rank that joined last, once all have; else None.
        join_error: Why the joining of those that have joined fails; "" if it does not.
        ended: All ranks want to end.
        trouble: Why a rank gives up, which ends the work of all; "" otherwise.
        news: Whether any rank said something new.
    """

    decisions: list[Decision] = field(default_factory=list)
    last_joined: int | None = None
    join_error: str = ""
    ended: bool = False
    trouble: str = ""
    news: bool = False


class Ledger:
    """The requests of all ranks that wait for each other.

    Args:
        ranks: The world's ranks of the group, for messages.
    """

    def __init__(self, ranks: Sequence[int]) -> None:
        self._ranks = list(ranks)
        self._forms: list[Form] = []
        self._numbers: dict[str, int] = {}
        self._held: set[int] = set()  # identities of the forms in the list
        self._waiting: dict[Key, dict[int, Form]] = {}
        self._number_of: dict[Key, int] = {}
        self._joined: list[int] = []  # in the order in which they did
        self.leaving: set[int] = set()

    def compose(self, requests: Sequence[tuple[str, int]], flags: int, trouble: str = "", steps: int = 0) -> Message:
        """This rank's message.

        Args:
            requests: Text of the form and number of each.
            flags: `JOIN`, `LEAVE`, both or none.
            trouble: Why this rank gives up.
            steps: See `Message`.
        """
        known = tuple((self._numbers[text], number) for text, number in requests if text in self._numbers)
        unknown = tuple((text, number) for text, number in requests if text not in self._numbers)
        return Message(flags, known, unknown, trouble, steps)

    def number_if_alone(self, text: str) -> int | None:
        """The number of a form that all ranks know, if nobody waits for anything and nobody has joined or wants to end."""
        if self._waiting or self._joined or self.leaving:
            return None
        return self._numbers.get(text)

    def asked_in(self, message: Message) -> list[tuple[Key, Form]]:
        """The requests of a message whose forms all ranks know, in its order."""
        found = []
        for at, number in message.known:
            form = self._forms[at]
            found.append((form.key(number), form))
        return found

    def hear(self, messages: Sequence[Message]) -> Outcome:
        """Take all ranks' messages of one round, in rank order."""
        outcome = Outcome()
        touched: dict[Key, None] = {}
        joining: list[tuple[int, int]] = []
        for rank, message in enumerate(messages):
            if message.trouble and not outcome.trouble:
                outcome.trouble = message.trouble
            asked = [(self._forms[at], number) for at, number in message.known]
            asked += [(Form.read(text), number) for text, number in message.unknown]
            outcome.news = outcome.news or bool(asked)
            for form, number in asked:
                key = form.key(number)
                self._waiting.setdefault(key, {})[rank] = form
                self._number_of[key] = number
                touched[key] = None
            if message.flags & JOIN and rank not in self._joined:
                joining.append((message.steps, rank))
                outcome.news = True
                touched.update(dict.fromkeys(self._waiting))
            if message.flags & LEAVE and rank not in self.leaving:
                self.leaving.add(rank)
                outcome.news = True
                touched.update(dict.fromkeys(self._waiting))
        self._joined += [
            rank for _, rank in sorted(joining)
        ]  # of those heard at once, who took more steps joined later
        outcome.decisions = [decision for key in touched if (decision := self._decide(key)) is not None]
        if len(self._joined) == len(self._ranks):
            outcome.last_joined = self._joined[-1]
            self._joined = []
        elif self._joined and self.leaving:
            outcome.join_error = f"hvd.join(): {self._gone(sorted(self.leaving))}"
            self._joined = []
        outcome.ended = len(self.leaving) == len(self._ranks)
        return outcome

    def missing(self, key: Key) -> list[int]:
        """The world's ranks that have not asked for it."""
        said = self._waiting.get(key, {})
        return [world for rank, world in enumerate(self._ranks) if rank not in said and rank not in self._joined]

    def asked_by(self, world_rank: int) -> list[str]:
        """What a rank has asked for and waits for."""
        rank = self._ranks.index(world_rank)
        return [said[rank].called(self._number_of[key]) for key, said in self._waiting.items() if rank in said]

    # -- inside -------------------------------------------------------------------------------------------------------

    def _decide(self, key: Key) -> Decision | None:
        said = self._waiting[key]
        others = [rank for rank in range(len(self._ranks)) if rank not in said]
        form, number = next(iter(said.values())), self._number_of[key]
        if gone := [rank for rank in others if rank in self.leaving]:
            error = f"{form.called(number)}: {self._gone(gone)}"
        elif any(rank not in self._joined for rank in others):
            return None
        elif any(other is not form and other != form for other in said.values()):
            error = f"{form.called(number)}: the ranks do not say the same: {self._by_rank(said)}"
        elif others and form.kind not in _WITH_JOINED:
            error = (
                f"{form.called(number)} needs all ranks, and {self._named(others)} called hvd.join(), after which only "
                "allreduce can go on"
            )
        else:
            error = ""
        del self._waiting[key], self._number_of[key]
        if not error:
            self._learn(form)
        return Decision(key, form, number, tuple(others), error)

    def _learn(self, form: Form) -> None:
        if id(form) in self._held:
            return
        text = form.text()
        if text in self._numbers:
            return
        if len(self._forms) >= _MOST_KNOWN:
            self._forms.clear()
            self._numbers.clear()
            self._held.clear()
        self._numbers[text] = len(self._forms)
        self._forms.append(form)
        self._held.add(id(form))

    def _gone(self, ranks: Sequence[int]) -> str:
        return f"{self._named(ranks)} called hvd.shutdown(), or left the program, without it"

    def _named(self, ranks: Sequence[int]) -> str:
        return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(str(self._ranks[rank]) for rank in ranks)}"

    def _by_rank(self, said: dict[int, Form]) -> str:
        groups: dict[str, list[int]] = {}
        for rank in sorted(said):
            groups.setdefault(said[rank].described(), []).append(rank)
        return "; ".join(f"{self._named(ranks)}: {text}" for text, ranks in groups.items())
