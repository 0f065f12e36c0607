"""From a checkpoint to a file of another format, and from such a file to a checkpoint that a run begins with.

Written whole or not at all, over nothing that is there, and bit for bit what was read.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from hvdtrain.errors import CheckpointError
from hvdtrain.exchange.content import Content, composed, taken_apart
from hvdtrain.exchange.dcp import METADATA, read_dcp, write_dcp
from hvdtrain.exchange.files import read_safetensors, read_torch, write_safetensors, write_torch
from hvdtrain.training import checkpoint_files, descent
from hvdtrain.training.checkpoint import Checkpoints
from hvdtrain.training.checkpoint_files import MANIFEST, Saved, check, flush, read_model, read_state
from hvdtrain.training.plain_state import from_plain, to_plain
from hvdtrain.version import __version__

_log = logging.getLogger(__name__)

FORMATS = ("safetensors", "torch", "dcp")
CHECKPOINTS = "checkpoints"
"""Where a run's folder has them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Moved:
    """What was written.

    Attributes:
        path: The file or folder.
        source: The checkpoint or file that it was made from.
        step: Optimizer steps of the checkpoint that was exported; 0 for one that was imported.
        tensors: Of the model.
        optimizer: Whether the optimizer's state is in it.
    """

    path: str
    source: str
    step: int
    tensors: int
    optimizer: bool


def export_checkpoint(source: Path, out: Path, *, form: str = "safetensors", optimizer: bool = False) -> Moved:
    """Write a checkpoint's model, and its optimizer's state if asked, as a file of another format.

    Args:
        source: A checkpoint, or the folder of a run or of its checkpoints, whose newest whole one is taken. Nothing in it
            is changed; the run may be going on.
        out: Made anew: a file, or a folder for "dcp".
        form: One of `FORMATS`.
        optimizer: Its state too, as its ``state_dict`` returned it.

    Raises:
        CheckpointError: There is no whole checkpoint, ``out`` exists or cannot be written, or the format or the checkpoint has
            no place for an optimizer's state.
    """
    if form == "safetensors" and optimizer:
        raise CheckpointError("a safetensors file holds the model alone; give --format torch or dcp with --optimizer")
    saved = newest(source)
    content = _content_of(saved)
    if optimizer and content.optimizer is None:
        raise CheckpointError(f"{saved.path} has no optimizer's state; leave --optimizer out")
    content = content if optimizer else replace(content, optimizer=None)
    notes = {"format": "pt", "step": str(saved.step), "written_by": f"hvdtrain {__version__}"}
    writers: dict[str, Callable[[Path], None]] = {
        "safetensors": lambda file: write_safetensors(content.model, file, notes),
        "torch": lambda file: write_torch(composed(content), file),
        "dcp": lambda folder: write_dcp(composed(content), folder),
    }
    _whole(out, writers[form])
    return Moved(path=str(out), source=saved.path, step=saved.step, tensors=len(content.model), optimizer=optimizer)


def import_file(source: Path, run: Path, *, optimizer: bool = True, trusted: bool = False) -> Moved:
    """Make a file of another format the checkpoint that a new run begins with, at step 0.

    Args:
        source: A safetensors file, one of ``torch.save``, or a DCP folder; told apart by what is in them.
        run: The folder of a run that has no checkpoints yet.
        optimizer: Take the optimizer's state too, where there is one.
        trusted: See `hvdtrain.exchange.files.read_torch`.

    Raises:
        CheckpointError: The file is damaged, unknown or unsafe, or the run has checkpoints already.
    """
    folder = run / CHECKPOINTS
    if _candidates(run) or _candidates(folder):
        raise CheckpointError(
            f"{run} has checkpoints already, and a run begins only once; name the folder of a new run, or move them away"
        )
    content = read_foreign(source, trusted=trusted)
    content = content if optimizer else replace(content, optimizer=None)
    training = {
        "optimizer": None
        if content.optimizer is None
        else to_plain(content.optimizer, f"the optimizer's state in {source}"),
        "kinds": {"optimizer": content.optimizer_class} if content.optimizer and content.optimizer_class else {},
        "position": {},
    }
    checkpoints = Checkpoints(folder, lock=run / ".lock")
    try:
        # Of no ranks: whoever goes on from it begins their random numbers anew.
        path = checkpoints.write(checkpoint_files.Content(step=0, model=content.model, training=training, ranks=[]))
    finally:
        checkpoints.release()
    return Moved(
        path=path, source=str(source), step=0, tensors=len(content.model), optimizer=content.optimizer is not None
    )


def read_foreign(source: Path, *, trusted: bool = False) -> Content:
    """Read a model, and an optimizer's state where there is one, from a file of another format.

    Raises:
        CheckpointError: It is damaged, unknown or unsafe.
    """
    try:
        return _read_foreign(source, trusted=trusted)
    except OSError as error:
        raise CheckpointError(f"{source} cannot be read: {error.strerror}") from error


def newest(source: Path) -> Saved:
    """The checkpoint that is meant: this one, or the newest whole one in a run's folder; changes nothing there.

    Raises:
        CheckpointError: There is none.
    """
    if (source / MANIFEST).exists():
        return check(source)
    if not source.is_dir():
        raise CheckpointError(f"{source} is no folder of a run and no checkpoint")
    candidates = _candidates(source / CHECKPOINTS) or _candidates(source)
    for path in candidates:
        try:
            return check(path)
        except CheckpointError as error:
            _log.warning("skipping a damaged checkpoint: %s", error)
    if candidates:
        raise CheckpointError(f"all {len(candidates)} checkpoints of {source} are damaged")
    raise CheckpointError(f"{source} has no checkpoint; name a run's folder, or one like step-00000120")


# -- inside -----------------------------------------------------------------------------------------------------------


def _candidates(folder: Path) -> list[Path]:
    """The checkpoints in a folder, whole or not, the newest first; [] if it is not there."""
    return list(reversed(descent.steps(folder).values())) if folder.is_dir() else []


def _content_of(saved: Saved) -> Content:
    training = read_state(Path(saved.path), "training")
    state = training.get("optimizer")
    return Content(
        model=read_model(saved),
        optimizer=None if not state else from_plain(state, None, f"the optimizer's state in {saved.path}"),
        optimizer_class=training.get("kinds", {}).get("optimizer", ""),
    )


def _read_foreign(source: Path, *, trusted: bool) -> Content:
    if source.is_dir():
        if (source / METADATA).is_file():
            return taken_apart(read_dcp(source, trusted=trusted), str(source))
        if (source / MANIFEST).exists():
            raise CheckpointError(f"{source} is a checkpoint of hvdtrain; a run begins with it by --resume {source}")
        raise CheckpointError(
            f"{source} is a folder without {METADATA}, so no torch.distributed.checkpoint; name a file"
        )
    if not source.is_file():
        there = "is neither a file nor a folder" if source.exists() else "does not exist"
        raise CheckpointError(f"{source} {there}; name a safetensors file, one of torch.save, or a DCP folder")
    with source.open("rb") as stream:
        start = stream.read(9)
    if start[:4] == b"PK\x03\x04":
        return taken_apart(read_torch(source, trusted=trusted), str(source))
    if start[8:9] == b"{":
        return taken_apart(read_safetensors(source), str(source))
    raise CheckpointError(
        f"{source} is neither a safetensors file nor one of torch.save (torch 1.6 or newer): it begins with {start[:8]!r}"
    )


def _whole(out: Path, write: Callable[[Path], None]) -> None:
    """Let it write beside, flush, and rename; nothing is left of it if it fails."""
    if out.exists() or out.is_symlink():
        raise CheckpointError(f"{out} is there already, and nothing is written over; name another file, or remove it")
    beside = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write(beside)
        for path in [*beside.iterdir(), beside] if beside.is_dir() else [beside]:
            flush(path)
        beside.rename(out)
    except CheckpointError:
        raise
    except Exception as error:  # what libraries make of a full disk differs
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(
            f"could not write {out}: {getattr(error, 'strerror', None) or lines[-1]}; free space there, or name another place"
        ) from error
    finally:
        if beside.is_dir():
            shutil.rmtree(beside, ignore_errors=True)
        else:
            beside.unlink(missing_ok=True)
