"""What one rank asks for: an operation under a name, its tensors, and what all ranks must say alike.

A `Form` is what is compared over the ranks, and travels between them; a `Request` is a form with this rank's tensors.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hvdtrain.horovod.reductions import NAMES
from hvdtrain.horovod.streams import reached

REDUCING = ("allreduce", "grouped_allreduce")
"""Operations in which a rank that has joined takes part with nothing."""

_FREE_FIRST = ("allgather", "alltoall", "grouped_allgather")  # whose first dimensions may differ between ranks


@dataclass(frozen=True, kw_only=True, slots=True)
class Form:
    """What all ranks must say alike.

    Attributes:
        kind: "allreduce", ...
        name: The user's name; None where calls without a name are numbered.
        tensors: dtype and shape of each; without the first dimension where that may differ.
        details: Reduction, root, factors: whatever else must be the same.
    """

    kind: str
    name: str | None = None
    tensors: tuple[tuple[str, tuple[int, ...]], ...] = ()
    details: tuple[tuple[str, Any], ...] = ()

    def text(self) -> str:
        """As what it travels."""
        return json.dumps([self.kind, self.name, self.tensors, self.details])

    def key(self, number: int) -> tuple[str, str]:
        """By what requests of this form are matched; ``number`` is that of one without a name."""
        return (self.kind, f"name {self.name}" if self.name is not None else f"number {number}")

    @classmethod
    def read(cls, text: str) -> Form:
        """The form that `text` describes."""
        kind, name, tensors, details = json.loads(text)
        return cls(
            kind=kind,
            name=name,
            tensors=tuple((dtype, tuple(shape)) for dtype, shape in tensors),
            details=tuple((key, value) for key, value in details),
        )

    def detail(self, key: str) -> Any:
        """One of the details."""
        return dict(self.details)[key]

    def called(self, number: int) -> str:
        """How messages name it."""
        if self.kind == "agreement":
            return f"hvd.{self.detail('what')}({self.detail('ranks')})"
        return f"{self.kind} {self.name!r}" if self.name is not None else f"{self.kind} without a name, number {number}"

    def described(self) -> str:
        """All that can differ, for people."""
        first = "..., " if self.kind in _FREE_FIRST else ""
        said = [f"{dtype} ({first}{', '.join(map(str, shape))})" for dtype, shape in self.tensors]
        said += [f"{key}={NAMES[value] if key == 'op' else value}" for key, value in self.details]
        return ", ".join(said) or self.kind


def form(kind: str, name: str | None, tensors: Sequence[Tensor], **details: Any) -> Form:
    """The form of an operation on tensors."""
    return form_and_text(kind, name, tensors, **details)[0]


def form_and_text(kind: str, name: str | None, tensors: Sequence[Tensor], **details: Any) -> tuple[Form, str]:
    """The form of an operation on tensors, and as what it travels; programs ask for the same ones again and again."""
    key = (kind, name, *[(t.dtype, t.shape) for t in tensors], *details.items())
    try:
        known = _known.get(key)
    except TypeError:  # lists cannot be looked up
        return _made(kind, name, tensors, details)
    # 1, 1.0 and True are the same key, and travel as different texts.
    if known is None or any(
        type(a) is not type(b) for (_, a), b in zip(known[0].details, details.values(), strict=True)
    ):
        if len(_known) >= _MOST_KNOWN:
            _known.clear()
        known = _known[key] = _made(kind, name, tensors, details)
    return known


_MOST_KNOWN = 8192
_known: dict[tuple[Any, ...], tuple[Form, str]] = {}


def _made(kind: str, name: str | None, tensors: Sequence[Tensor], details: dict[str, Any]) -> tuple[Form, str]:
    start = 1 if kind in _FREE_FIRST else 0
    made = Form(
        kind=kind,
        name=name,
        tensors=tuple((str(t.dtype).removeprefix("torch."), tuple(t.shape)[start:]) for t in tensors),
        details=tuple(details.items()),
    )
    return made, made.text()


_ending = threading.Lock()  # one for all: it is held for a moment


@dataclass(slots=True, eq=False)
class Request:
    """One rank's part in an operation, and its end.

    Attributes:
        form: What all ranks must say alike.
        tensors: What goes in.
        outputs: Where results are to be written, for operations that can say so beforehand.
        splits: For alltoall: how many rows go to each rank.
        number: Of a call without a name, counted by kind.
        act: What is done once all ranks have asked for it, in the order in which all of them come to do such things.
        result: What came out, once it is over.
        error: What it failed with.
        ready: What must be done on GPUs before it is performed.
        done: What must be done on GPUs before its results are used.
    """

    form: Form
    tensors: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    splits: list[int] = field(default_factory=list)
    number: int = 0
    text: str = ""
    act: Callable[[], Any] | None = None
    result: Any = None
    error: Exception | None = None
    began: float = 0.0
    ready: list[torch.cuda.Event] = field(default_factory=list)
    done: list[torch.cuda.Event] = field(default_factory=list)
    over: bool = False
    """Whether it has ended, well or badly."""
    _waited_for: threading.Event | None = None

    def __post_init__(self) -> None:
        self.text = self.text or self.form.text()

    @property
    def key(self) -> tuple[str, str]:
        """By which it is matched with the other ranks' requests."""
        return self.form.key(self.number)

    @property
    def called(self) -> str:
        """How messages name it."""
        return self.form.called(self.number)

    def finish(self, result: Any = None) -> None:
        """End it with a result; only the first end counts."""
        if not self.over:
            self.result = result
            self.done = reached(self.tensors)
            self._end()

    def fail(self, error: Exception) -> None:
        """End it with an error; only the first end counts."""
        if not self.over:
            self.error = error
            self._end()

    def wait(self, timeout_s: float) -> bool:
        """Block until it is over, or ``timeout_s`` seconds have passed; say whether it is over."""
        with _ending:
            if self.over:
                return True
            if self._waited_for is None:
                self._waited_for = threading.Event()
            waited_for = self._waited_for
        return waited_for.wait(timeout_s)

    def _end(self) -> None:
        with _ending:
            self.over = True
            waited_for = self._waited_for
        if waited_for is not None:
            waited_for.set()


def dtype_of(name: str) -> torch.dtype:
    """The dtype of that name."""
    found = getattr(torch, name)
    assert isinstance(found, torch.dtype)
    return found
