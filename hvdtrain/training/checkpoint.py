"""Checkpoints: whole or absent, never half, and never unpickled.

`hvdtrain.training.checkpoint_files` says what one is made of. Rank 0 writes it; all ranks learn how that went before any
goes on. The file system need not be shared: what the other ranks need comes to them from rank 0.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

from torch import Tensor, nn

from hvdtrain.backends.units import is_cut
from hvdtrain.backends.watched import COMPILED, without_compile
from hvdtrain.errors import CheckpointError, OutputError
from hvdtrain.folder_lock import FolderInUse, FolderLock, take
from hvdtrain.training import descent
from hvdtrain.training.checkpoint_files import (
    Content,
    Saved,
    check,
    free_space,
    name_of,
    read_model,
    read_state,
    recover,
    step_of,
    write_checkpoint,
)
from hvdtrain.training.mirror import Mirror

_log = logging.getLogger(__name__)

_WAIT_S = 3.0  # for a job that is just ending
T = TypeVar("T")


class Ranks(Protocol):
    """What checkpoints need of a backend."""

    @property
    def rank(self) -> int:
        """This rank."""
        ...

    @property
    def world_size(self) -> int:
        """The number of ranks."""
        ...

    def broadcast_object(self, obj: T, src: int = 0) -> T:
        """Give every rank rank ``src``'s object."""
        ...

    def all_gather_object(self, obj: T) -> list[T]:
        """Collect every rank's object on every rank."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Loaded:
    """What a checkpoint holds.

    Attributes:
        path: The folder.
        step: Optimizer steps done.
        training: As it was given to `Checkpoints.save`.
        rank_states: Every saved rank's state, in rank order.
    """

    path: str
    step: int
    training: dict[str, Any]
    rank_states: list[dict[str, Any]]


class Checkpoints:
    """The checkpoints of one run, and the right to write them, which one job at a time has.

    Args:
        folder: Made when the first is written. It holds one line of descent: checkpoints that are of no use to the run that
            writes, because it began anew or went on from an older one, are set aside in ``FOLDER.1`` and so on.
        keep: How many of the newest to keep.
        lock: The file that says which job writes; by default in the folder.
        settings: Written into each checkpoint, for whoever goes on with it: text, numbers, lists and dictionaries.
        mirror: A second place, which each is copied to, and brought back from where the folder has lost it.

    Raises:
        CheckpointError: ``keep`` is less than 1.
    """

    def __init__(
        self,
        folder: Path | str,
        keep: int = 3,
        *,
        lock: Path | None = None,
        settings: Mapping[str, Any] | None = None,
        mirror: Mirror | None = None,
    ) -> None:
        if keep < 1:
            raise CheckpointError(f"keep at least 1 checkpoint, got {keep}")
        self.folder = Path(folder)
        self.keep = keep
        self._settings = dict(settings or {})
        self._mirror = mirror
        self._lock_file = lock or self.folder / ".lock"
        self._lock: FolderLock | None = None

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
        """Write a checkpoint; every rank must call it.

        Args:
            ranks: The backend.
            step: Optimizer steps done; names the folder.
            model: The model's state (`model_state`); rank 0's is written.
            training: Tensors, numbers, text, and lists and dictionaries of these; rank 0's is written.
            rank_state: Likewise, of this rank; every rank's is written.
            last: See `write`.

        Returns:
            The folder.

        Raises:
            CheckpointError: On every rank, if rank 0 could not write; earlier checkpoints are as they were.
        """
        everyone = ranks.all_gather_object(dict(rank_state))
        problem = ""
        path = str(self.folder / name_of(step))
        if ranks.rank == 0:
            try:
                self.write(
                    Content(step=step, model=model, training=training, ranks=everyone, settings=self._settings), last
                )
            except CheckpointError as error:
                problem = str(error)
        problem = ranks.broadcast_object(problem)
        if problem:
            raise CheckpointError(problem)
        return path

    def write(self, content: Content, last: str | None = "") -> str:
        """Write a checkpoint, on rank 0; it talks to no other rank, so that a thread may do it.

        Args:
            content: Nobody may change it meanwhile.
            last: The checkpoint that this line wrote last, or went on from; None for a line that begins here. By default all
                earlier ones in the folder are taken for this line's.

        Raises:
            CheckpointError: It could not be written.
        """
        path = self.folder / name_of(content.step)
        try:
            self.claim()
            self._set_aside(content.step if last == "" else self._step_in_folder(last))
            write_checkpoint(self.folder, content)
        except CheckpointError as error:
            raise CheckpointError(f"could not write {path}: {error}") from error
        except Exception as error:
            raise CheckpointError(
                f"could not write {path}: {error or type(error).__name__}{free_space(self.folder)}. Earlier checkpoints are "
                "unharmed; mend it and go on with --resume auto"
            ) from error
        try:
            descent.thin(self.folder, self.keep)
        except OSError as error:
            _log.warning("older checkpoints than the newest %d could not be deleted: %s", self.keep, error)
        if self._mirror is not None:
            self._mirror.put(path, self.keep)
        return str(path)

    def failed(self) -> bool:
        """Whether something failed that `settle` will raise; only rank 0 may know. Never here: `save` has raised it."""
        return False

    def settle(self, ranks: Ranks) -> None:
        """Return when all that was saved is on the disk, which it is here; every rank must call it.

        Raises:
            CheckpointError: On every rank: it could not be written.
        """

    def claim(self) -> None:
        """Make the folder this process's to write in, until it ends; for rank 0. To write does it too.

        Raises:
            CheckpointError: Another job has it; the message names it.
        """
        if self._lock is None or not self._lock.holds:
            lost = self._lock is not None
            place = self._lock_file.parent
            try:
                self._lock = take(self._lock_file, wait_s=_WAIT_S)
            except FolderInUse as holder:
                raise CheckpointError(
                    f"{place} is in use by another job, {holder}: it would overwrite what this one writes. Wait for it, end "
                    "it, or use another --run-dir"
                ) from None
            except OSError as error:
                raise CheckpointError(
                    f"nothing can be written in {place}: {error.strerror} ({self._lock_file.name})"
                ) from error
            if lost:
                _log.warning("%s was deleted while this run wrote in it; it is made anew, and this run goes on", place)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(
                f"no checkpoints can be written in {self.folder}: {error.strerror}; move what is there away, or use another --run-dir"
            ) from error
        self._tidy()

    def release(self) -> None:
        """Let other jobs write in the folder; for rank 0."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def begin(self, going_on_from: Saved | None, beside: Sequence[Path] = ()) -> str:
        """Set aside what is not of the line that begins or goes on now; for rank 0.

        Args:
            going_on_from: The checkpoint that it goes on from; None for a new line.
            beside: Files of the line that is left, copies of which are put with its checkpoints.

        Returns:
            What was done, in a sentence; "" if nothing was.

        Raises:
            CheckpointError: Another job has the folder, or nothing can be moved there.
        """
        after = None if going_on_from is None else self._step_in_folder(going_on_from.path)
        if self._mirror is not None:
            self._mirror.refuse_other_lines(after)
        self.claim()
        try:
            return self._set_aside(after, beside)
        except (OSError, OutputError) as error:
            raise CheckpointError(f"older checkpoints could not be moved out of {self.folder}: {error}") from error

    def latest(self) -> Saved | None:
        """Return the newest whole checkpoint, or None if there are none; warns of damaged ones. For rank 0.

        Raises:
            CheckpointError: There are some, and none is whole.
        """
        if self._mirror is not None:
            self.claim()
            self._mirror.bring_back(self.folder)
        if not self.folder.is_dir():
            return None
        self._tidy()
        problems = []
        for path in reversed(descent.steps(self.folder).values()):
            try:
                return check(path)
            except CheckpointError as error:
                problems.append(str(error))
                _log.warning("skipping a damaged checkpoint: %s", error)
        if problems:
            raise CheckpointError(
                f"none of the {len(problems)} checkpoints in {self.folder} is whole ({problems[0]}). Bring one back from a copy, "
                "or name another one with --resume PATH; --resume never sets them aside and begins anew"
            )
        return None

    def find(self, ranks: Ranks, which: Saved | Path | str = "latest") -> Saved | None:
        """Return a checkpoint on every rank, as rank 0 sees it; every rank must call it.

        Args:
            ranks: The backend.
            which: "latest" for the newest whole one in this folder, or the folder of one.

        Returns:
            The checkpoint; None if the newest was asked for and there is none.

        Raises:
            CheckpointError: On every rank: the one that was named is damaged or none, or there are only damaged ones.
        """
        return agree(ranks, lambda: self.latest() if which == "latest" else opened(which))

    # -- inside -------------------------------------------------------------------------------------------------------

    def _tidy(self) -> None:
        """Finish or undo what a killed writer began, unless a living one may be at it."""
        if all(name.startswith("step-") or name == ".lock" for name in os.listdir(self.folder)):
            return
        lock = None
        try:
            if self._lock is None or not self._lock.holds:
                lock = take(self._lock_file)
            descent.finish_setting_aside(self.folder)
            recover(self.folder)
        except FolderInUse as holder:
            _log.warning("%s is in use by another job, %s; this one can only read there", self.folder, holder)
        except OSError as error:
            _log.info("%s cannot be tidied up: %s", self.folder, error)
        finally:
            if lock is not None:
                lock.release()

    def _step_in_folder(self, path: str | None) -> int | None:
        """The step of a checkpoint, if it is in this folder."""
        if path is None or os.path.realpath(Path(path).parent) != os.path.realpath(self.folder):
            return None
        return step_of(Path(path).name)

    def _set_aside(self, after: int | None, beside: Sequence[Path] = ()) -> str:
        moved = descent.set_aside(self.folder, after=after, beside=beside)
        if moved is None:
            return ""
        target, names = moved
        which = names[0] if len(names) == 1 else f"{len(names)} checkpoints, {names[0]} to {names[-1]},"
        text = f"set aside in {target}: {which} of a line that this run does not go on with"
        _log.info("%s", text)
        return text


def opened(which: Saved | Path | str) -> Saved:
    """Return a checkpoint as it was found, or find it at its path; see `check`."""
    if isinstance(which, Saved):
        return which
    path = Path(which)
    return check(path.resolve() if path.is_symlink() else path)


def model_state(model: nn.Module, *, cut: bool = False) -> dict[str, Tensor]:
    """Return a model's state_dict by the names that it has without `torch.compile`, of itself or of modules in it.

    Args:
        model: The model.
        cut: Allow tensors that are cut over the ranks.

    Raises:
        CheckpointError: Two tensors have the same name without it, or one is cut over the ranks.
    """
    state = model.state_dict()
    part = next((name for name, value in state.items() if is_cut(value)), None)
    if part is not None and not cut:
        raise CheckpointError(
            f"{part!r} is cut over the ranks, and a checkpoint holds whole tensors: replica.whole_state()"
        )
    plain = {without_compile(name): value for name, value in state.items()}
    if len(plain) != len(state):
        twice = sorted(name for name in plain if sum(without_compile(other) == name for other in state) > 1)
        raise CheckpointError(
            f"the model has several tensors named {twice[0]!r}, apart from {COMPILED!r}; rename a module"
        )
    return plain


def load(
    ranks: Ranks, which: Saved | Path | str | None, model: nn.Module, apart: dict[str, Any] | None = None
) -> Loaded | None:
    """Read a checkpoint on rank 0, fill rank 0's model, and tell every rank the rest; every rank must call it.

    The other ranks' models are filled when the model is replicated, or by `Backend.broadcast_`.

    Args:
        ranks: The backend.
        which: A checkpoint that was found, or the folder of one; rank 0's counts. None for no checkpoint.
        model: Of the same structure as the saved one; either of them may be compiled.
        apart: Gets, on rank 0 alone, what is to be cut over the ranks and goes to none of them whole: the tensors as "model",
            with which the model is not filled, and the optimizer's state as "optimizer", if there is one.

    Returns:
        The checkpoint, without the model; None if rank 0 gave none.

    Raises:
        CheckpointError: On every rank: damaged, of another model, or not readable without unpickling.
    """
    return agree(ranks, lambda: None if which is None else _read(opened(which), model, apart))


def agree(ranks: Ranks, look: Callable[[], T]) -> T:
    """Return rank 0's result on every rank; every rank must call it.

    Raises:
        CheckpointError: On every rank: rank 0's failure.
    """
    found: T | None = None
    problem = ""
    if ranks.rank == 0:
        try:
            found = look()
        except (CheckpointError, OSError) as error:
            problem = str(error)
    problem, found = ranks.broadcast_object((problem, found))
    if problem:
        raise CheckpointError(problem)
    return cast(T, found)


def _read(saved: Saved, model: nn.Module, apart: dict[str, Any] | None) -> Loaded:
    path = Path(saved.path)
    tensors, training = read_model(saved), read_state(path, "training")
    if apart is None:
        fill(model, tensors, str(path))
    else:
        apart["model"] = fitting(model, tensors, str(path))
        if training.get("optimizer"):
            apart["optimizer"], training["optimizer"] = training["optimizer"], {"param_groups": []}
    return Loaded(path=str(path), step=saved.step, training=training, rank_states=read_state(path, "ranks"))


def fill(model: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Load a `model_state`; either model may be compiled.

    Args:
        model: Loaded in place.
        tensors: Of exactly its names, shapes and types.
        where: What messages call the source.

    Raises:
        CheckpointError: The model is another; names the first differences.
    """
    model.load_state_dict(fitting(model, tensors, where))


def fitting(model: nn.Module, tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Return a `model_state` by the names that a model's tensors have in it; see `fill`."""
    tensors = {without_compile(name): value for name, value in tensors.items()}
    own = model_state(model, cut=True)
    differences = [f"missing {name}" for name in own if name not in tensors]
    differences += [f"unexpected {name}" for name in tensors if name not in own]
    differences += [
        f"{name} is {tuple(tensors[name].shape)} {tensors[name].dtype}, the model's {tuple(value.shape)} {value.dtype}"
        for name, value in own.items()
        if name in tensors and (tensors[name].shape != value.shape or tensors[name].dtype != value.dtype)
    ]
    if differences:
        more = f" and {len(differences) - 5} more" if len(differences) > 5 else ""
        raise CheckpointError(
            f"{where} is of another model: {'; '.join(differences[:5])}{more}. Use the --model and --precision it was written "
            "with, another --run-dir, or --resume never"
        )
    return {name: tensors[without_compile(name)] for name in model.state_dict()}
