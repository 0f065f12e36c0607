"""Checkpoints: whole or absent, never half, and never unpickled.

One checkpoint is a folder::

    step-00000120/
        model.safetensors    parameters and buffers of rank 0, by the names they have without `torch.compile`
        training.pt          optimizer, schedule, scaler, position (read with weights_only=True)
        ranks.pt             each rank's random state and tally
        manifest.json        format, step, world size, versions; size and SHA-256 of each file; written last

Rank 0 writes it under another name, flushes files and folder to the disk, and renames it; all ranks learn how that
went before any goes on. The file system need not be shared: what the other ranks need comes to them from rank 0.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hvdtrain.errors import CheckpointError
from hvdtrain.version import __version__

_log = logging.getLogger(__name__)

FORMAT = 1
_NAME = re.compile(r"step-(\d{8,})")
_COMPILED = "_orig_mod"
_FILES = ("model.safetensors", "training.pt", "ranks.pt")
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
class Saved:
    """A checkpoint that has been found whole.

    Attributes:
        path: The folder.
        step: Optimizer steps done.
        aliases: For each tensor of the model that is another's (tied weights), the name under which it was written.
    """

    path: str
    step: int
    aliases: dict[str, str]


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Contents:
    """All that a checkpoint holds.

    Attributes:
        model: Tensors by name; names of tied weights share one.
        training: As it was given to `Checkpoints.save`.
        rank_states: Every saved rank's state, in rank order.
    """

    model: dict[str, Tensor]
    training: dict[str, Any]
    rank_states: list[dict[str, Any]]


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: Made when the first is written.
        keep: How many of the newest to keep.

    Raises:
        CheckpointError: ``keep`` is less than 1.
    """

    def __init__(self, folder: Path | str, keep: int = 3) -> None:
        if keep < 1:
            raise CheckpointError(f"keep at least 1 checkpoint, got {keep}")
        self.folder = Path(folder)
        self.keep = keep

    def save(
        self,
        ranks: Ranks,
        *,
        step: int,
        model: Mapping[str, Tensor],
        training: Mapping[str, Any],
        rank_state: Mapping[str, Any],
    ) -> str:
        """Write a checkpoint; every rank must call it.

        Args:
            ranks: The backend.
            step: Optimizer steps done; names the folder.
            model: The model's state (`model_state`); rank 0's is written.
            training: Tensors, numbers, text, and lists and dictionaries of these; rank 0's is written.
            rank_state: Likewise, of this rank; every rank's is written.

        Returns:
            The folder.

        Raises:
            CheckpointError: On every rank, if rank 0 could not write; earlier checkpoints are as they were.
        """
        everyone = ranks.all_gather_object(dict(rank_state))
        problem = ""
        path = self.folder / f"step-{step:08d}"
        if ranks.rank == 0:
            try:
                self._write(path, step, model, dict(training), everyone)
            except (OSError, SafetensorError, RuntimeError, pickle.PicklingError, TypeError, ValueError) as error:
                problem = f"could not write {path}: {error}{_free_space(self.folder)}"
        problem = ranks.broadcast_object(problem)
        if problem:
            raise CheckpointError(f"{problem}. Earlier checkpoints are unharmed; mend it and go on with --resume auto")
        return str(path)

    def latest(self) -> Saved | None:
        """Return the newest whole checkpoint, or None; warns of damaged ones. For rank 0."""
        if not self.folder.is_dir():
            return None
        self._sweep()
        for path in sorted((p for p in self.folder.iterdir() if _NAME.fullmatch(p.name)), reverse=True):
            try:
                return check(path)
            except CheckpointError as error:
                _log.warning("skipping a damaged checkpoint: %s", error)
        return None

    def find(self, ranks: Ranks, which: Saved | Path | str = "latest") -> Saved | None:
        """Return a checkpoint on every rank, as rank 0 sees it; every rank must call it.

        Args:
            ranks: The backend.
            which: "latest" for the newest whole one in this folder, or the folder of one.

        Returns:
            The checkpoint; None if the newest was asked for and there is none.

        Raises:
            CheckpointError: On every rank: the one that was named is damaged or none.
        """
        return _agree(ranks, lambda: self.latest() if which == "latest" else opened(which))

    # -- inside -------------------------------------------------------------------------------------------------------

    def _write(
        self, path: Path, step: int, model: Mapping[str, Tensor], training: dict[str, Any], everyone: list[Any]
    ) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._sweep()
        partial = self.folder / f"partial-{os.getpid()}-{path.name}"
        old = self.folder / f"old-{os.getpid()}-{path.name}"
        partial.mkdir()
        try:
            tensors, aliases = _without_aliases(model)
            save_file(tensors, partial / _FILES[0])
            torch.save(training, partial / _FILES[1])
            torch.save(everyone, partial / _FILES[2])
            manifest = {
                "format": FORMAT,
                "step": step,
                "world_size": len(everyone),
                "hvdtrain_version": __version__,
                "torch_version": torch.__version__,
                "aliases": aliases,
                "files": {name: _fingerprint(partial / name) for name in _FILES},
            }
            (partial / "manifest.json").write_text(json.dumps(manifest, indent=2))
            for file in partial.iterdir():
                flush(file)
            flush(partial)
            if (
                path.exists()
            ):  # written again after a resume: if we are killed here, `_sweep` or `latest` brings it back
                path.rename(old)
            partial.rename(path)
            flush(self.folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            if old.exists() and not path.exists():
                old.rename(path)
            raise
        shutil.rmtree(old, ignore_errors=True)
        whole = sorted((p for p in self.folder.iterdir() if _NAME.fullmatch(p.name)), reverse=True)
        for surplus in whole[self.keep :]:
            doomed = self.folder / f"old-{os.getpid()}-{surplus.name}"
            surplus.rename(doomed)  # a half-deleted folder must not look like a checkpoint
            shutil.rmtree(doomed, ignore_errors=True)

    def _sweep(self) -> None:
        """Remove what a killed writer left; bring back a checkpoint that it had moved aside and not replaced."""
        for left in self.folder.glob("old-*-step-*"):
            name = left.name.split("-", 2)[2]
            if not (self.folder / name).exists() and (left / "manifest.json").exists():
                left.rename(self.folder / name)
            else:
                shutil.rmtree(left, ignore_errors=True)
        for left in self.folder.glob("partial-*-step-*"):
            shutil.rmtree(left, ignore_errors=True)


def step_folders(folder: Path) -> list[Path]:
    """The checkpoints in a folder, whole or not, the newest first; [] if it is not there."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if _NAME.fullmatch(path.name)), reverse=True)


def opened(which: Saved | Path | str) -> Saved:
    """Return a checkpoint as it was found, or find it at its path; see `check`."""
    return which if isinstance(which, Saved) else check(Path(which))


def check(path: Path) -> Saved:
    """Return a checkpoint if it is whole; reads all of it.

    Raises:
        CheckpointError: Says which file is missing or damaged.
    """
    try:
        manifest: dict[str, Any] = json.loads((path / "manifest.json").read_text())
        version = manifest["format"]
        if version != FORMAT:
            raise CheckpointError(f"{path} has format {version}; this hvdtrain {__version__} reads format {FORMAT}")
        files = manifest["files"]
        saved = Saved(path=str(path), step=int(manifest["step"]), aliases=dict(manifest["aliases"]))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} is no checkpoint: it has no manifest.json; name a folder like step-00000120"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path / 'manifest.json'} cannot be read: {error}") from error
    for name, expected in files.items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing")
        if _fingerprint(file) != expected:
            raise CheckpointError(f"{file} is damaged: its size or SHA-256 differs from the manifest")
    return saved


def model_state(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's state_dict by the names that it has without `torch.compile`, of itself or of modules in it.

    Raises:
        CheckpointError: Two tensors have the same name without it.
    """
    state = model.state_dict()
    plain = {_without_compile(name): value for name, value in state.items()}
    if len(plain) != len(state):
        twice = sorted(name for name in plain if sum(_without_compile(other) == name for other in state) > 1)
        raise CheckpointError(
            f"the model has several tensors named {twice[0]!r}, apart from {_COMPILED!r}; rename a module"
        )
    return plain


def load(ranks: Ranks, which: Saved | Path | str | None, model: nn.Module) -> Loaded | None:
    """Read a checkpoint on rank 0, fill rank 0's model, and tell every rank the rest; every rank must call it.

    The other ranks' models are filled when the model is replicated, or by `Backend.broadcast_`.

    Args:
        ranks: The backend.
        which: A checkpoint that was found, or the folder of one; rank 0's counts. None for no checkpoint.
        model: Of the same structure as the saved one; either of them may be compiled.

    Returns:
        The checkpoint, without the model; None if rank 0 gave none.

    Raises:
        CheckpointError: On every rank: damaged, of another model, or not readable without unpickling.
    """
    return _agree(ranks, lambda: None if which is None else _read(opened(which), model))


def _agree(ranks: Ranks, look: Callable[[], T]) -> T:
    """Rank 0's result on every rank, or its failure."""
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


def _read(saved: Saved, model: nn.Module) -> Loaded:
    found = contents(saved)
    fill(model, found.model, saved.path)
    return Loaded(path=saved.path, step=saved.step, training=found.training, rank_states=found.rank_states)


def contents(saved: Saved) -> Contents:
    """Read all that a checkpoint holds.

    Raises:
        CheckpointError: It is not readable without unpickling.
    """
    path = Path(saved.path)
    tensors = load_file(path / _FILES[0])
    for name, source in saved.aliases.items():
        tensors[name] = tensors[source]
    try:
        training = torch.load(path / _FILES[1], map_location="cpu", weights_only=True)
        everyone = torch.load(path / _FILES[2], map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        raise CheckpointError(
            f"{path}: the training state cannot be read without unpickling, which is not done: {error}"
        ) from error
    return Contents(model=tensors, training=training, rank_states=everyone)


def fill(model: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Load a `model_state`; either model may be compiled.

    Args:
        model: Loaded in place.
        tensors: Of exactly its names, shapes and types.
        where: What messages call the source.

    Raises:
        CheckpointError: The model is another; names the first differences.
    """
    tensors = {_without_compile(name): value for name, value in tensors.items()}
    own = model_state(model)
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
    model.load_state_dict({name: tensors[_without_compile(name)] for name in model.state_dict()})


def _without_compile(name: str) -> str:
    """A tensor's name without what `torch.compile` puts before it: its wrapper holds the module under a name of its own."""
    return ".".join(part for part in name.split(".") if part != _COMPILED)


def _without_aliases(model: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors to write, and for each name whose tensor is written under another name (tied weights), that name."""
    first: dict[tuple[Any, ...], str] = {}
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    for name, value in model.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"the model's state {name!r} is a {type(value).__name__}; only tensors can be saved")
        key = (value.data_ptr(), tuple(value.shape), value.stride(), value.dtype)
        if value.numel() and key in first:
            aliases[name] = first[key]
            continue
        first[key] = name
        tensors[name] = value.detach().cpu().contiguous().clone()
    return tensors, aliases


def _fingerprint(file: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return {"bytes": file.stat().st_size, "sha256": digest.hexdigest()}


def flush(path: Path) -> None:
    """Have a file's content, or a folder's list of files, on the disk before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _free_space(folder: Path) -> str:
    try:
        return f" ({shutil.disk_usage(folder).free / 2**20:.0f} MiB are free there)"
    except OSError:
        return ""
