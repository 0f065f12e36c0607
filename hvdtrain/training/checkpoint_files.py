"""The files of one checkpoint: how they are written whole, and how they are looked at before anything in them is believed.

A checkpoint is a folder::

    step-00000120/
        model.safetensors     parameters and buffers of rank 0, by the names they have without `torch.compile`
        training.json         optimizer, schedule, scaler, position: what is no tensor
        training.safetensors  the tensors of these
        ranks.json            each rank's random state and tally
        ranks.safetensors     the tensors of these
        manifest.json         format, step, world size, versions, settings; size and SHA-256 of each file; written last

Nothing here talks to other ranks, so that a thread may write.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from hvdtrain.errors import CheckpointError
from hvdtrain.training.plain_file import Packed, from_json, pack, to_json, unpack
from hvdtrain.version import __version__

FORMAT = 2
MANIFEST, MODEL = "manifest.json", "model.safetensors"
STATES = ("training", "ranks")
FILES = (MODEL, *(f"{name}.{kind}" for name in STATES for kind in ("json", "safetensors")))
_NAME = re.compile(r"step-(\d{8,})")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_LARGEST_JSON = {MANIFEST: 2**26, "training.json": 2**30, "ranks.json": 2**30}
AS_PAIRS = (torch.complex128, torch.complex32)
"""Types that safetensors lacks: here pairs of real numbers, named in the file's metadata."""
_KEYS: dict[str, type] = {
    "format": int,
    "step": int,
    "world_size": int,
    "hvdtrain_version": str,
    "torch_version": str,
    "settings": dict,
    "aliases": dict,
    "files": dict,
    "sha256": str,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Content:
    """What one checkpoint is made of.

    Attributes:
        step: Optimizer steps done.
        model: Parameters and buffers.
        training: A plain state (`to_plain`), of rank 0.
        ranks: Likewise, one for each rank.
        settings: What the run was told, for whoever goes on with it: text, numbers, lists and dictionaries.
    """

    step: int
    model: Mapping[str, Tensor]
    training: Mapping[str, Any]
    ranks: list[Any]
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Saved:
    """A checkpoint that has been found whole.

    Attributes:
        path: The folder.
        step: Optimizer steps done.
        world_size: Ranks that it was written by; 0 for one that was imported.
        settings: As in `Content`.
        aliases: For each tensor of the model that is another's (tied weights), the name under which it was written.
    """

    path: str
    step: int
    world_size: int
    settings: dict[str, Any]
    aliases: dict[str, str]


def name_of(step: int) -> str:
    """The folder of a step's checkpoint."""
    return f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """The step of a checkpoint's folder; None if it is no such name."""
    match = _NAME.fullmatch(name)
    return int(match[1]) if match and name == name_of(int(match[1])) else None


# -- writing ----------------------------------------------------------------------------------------------------------


def write_checkpoint(folder: Path, content: Content) -> Path:
    """Write a checkpoint beside, flush it to the disk, and rename it; it is there whole or not at all.

    Args:
        folder: Of checkpoints; it must be there. One of the same step is replaced.
        content: What to write; nobody may change it meanwhile.

    Returns:
        The checkpoint.

    Raises:
        Exception: Of any kind; the folder is as it was.
    """
    path = folder / name_of(content.step)
    partial = folder / f"partial-{os.getpid()}-{path.name}"
    old = folder / f"old-{os.getpid()}-{path.name}"
    discard(partial)
    partial.mkdir()
    try:
        _fill(partial, content)
        for file in partial.iterdir():
            flush(file)
        flush(partial)
        if os.path.lexists(path):  # written again after a resume: if we are killed here, `recover` brings it back
            discard(old)
            path.rename(old)
        partial.rename(path)
        flush(folder)
    except BaseException:
        discard(partial)
        if os.path.lexists(old) and not os.path.lexists(path):
            old.rename(path)
        raise
    discard(old)
    return path


def recover(folder: Path) -> None:
    """Remove what a killed writer left; bring back a checkpoint that it had moved aside and not replaced."""
    for left in folder.glob("old-*-step-*"):
        name = left.name.split("-", 2)[2]
        if not (folder / name).exists() and (left / MANIFEST).exists():
            left.rename(folder / name)
        else:
            discard(left)
    for left in folder.glob("partial-*-step-*"):
        discard(left)


def remove(path: Path) -> None:
    """Delete a checkpoint; a half-deleted one does not look like one."""
    doomed = path.with_name(f"old-{os.getpid()}-{path.name}")
    path.rename(doomed)
    with suppress(OSError):
        (doomed / MANIFEST).unlink()  # or `recover` would bring it back
    discard(doomed)


def _fill(folder: Path, content: Content) -> None:
    tensors, aliases = _without_aliases(content.model)
    pairs = {name: str(tensor.dtype) for name, tensor in tensors.items() if tensor.dtype in AS_PAIRS}
    tensors |= {name: torch.view_as_real(tensors[name]) for name in pairs}
    save_file(tensors, folder / MODEL, pairs or None)
    del tensors
    for name, state in (("training", dict(content.training)), ("ranks", content.ranks)):
        packed = pack(state, f"the {name} state")
        (folder / f"{name}.json").write_bytes(to_json(packed.tree))
        save_file(packed.tensors, folder / f"{name}.safetensors")
    for file in folder.glob("*.safetensors"):  # which safetensors may have made for this user alone
        shutil.copymode(folder / "ranks.json", file)
    manifest = {
        "format": FORMAT,
        "step": content.step,
        "world_size": len(content.ranks),
        "hvdtrain_version": __version__,
        "torch_version": str(torch.__version__),
        "settings": dict(content.settings),
        "aliases": aliases,
        "files": {name: _fingerprint(folder / name) for name in FILES},
    }
    (folder / MANIFEST).write_bytes(to_json({**manifest, "sha256": _digest(manifest)}))


def _without_aliases(model: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors to write, and for each name whose tensor is written under another name (tied weights), that name."""
    first: dict[tuple[Any, ...], str] = {}
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    for name, value in model.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"the model's state {name!r} is a {type(value).__name__}; only tensors can be saved")
        key = (value.device, value.data_ptr(), tuple(value.shape), value.stride(), value.dtype)
        if value.numel() and key in first:
            aliases[name] = first[key]
            continue
        first[key] = name
        tensors[name] = value.detach().cpu().contiguous().clone()
    return tensors, aliases


def discard(path: Path) -> None:
    """Delete whatever is there, as far as that can be done."""
    shutil.rmtree(path, ignore_errors=True)
    if not path.is_dir() or path.is_symlink():
        with suppress(OSError):
            path.unlink()


def flush(path: Path) -> None:
    """Have a file, or a folder's list of files, on the disk itself, where a power cut does not reach it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# -- reading ----------------------------------------------------------------------------------------------------------


def check(path: Path) -> Saved:
    """Return a checkpoint if it is whole: kinds and sizes of files first, then their structure, then every byte.

    Args:
        path: The folder itself, not a link to it.

    Raises:
        CheckpointError: Says which file is missing or damaged, and how.
    """
    _check_kind(path, stat.S_ISDIR, "a folder")
    manifest = _manifest(path)
    files = manifest["files"]
    for name, expected in files.items():
        with _opened(path / name) as stream:
            size = os.fstat(stream.fileno()).st_size
        if size != expected["bytes"]:
            raise CheckpointError(
                f"{path / name} is damaged: it has {size} bytes, and {expected['bytes']} were written"
            )
        if size > _LARGEST_JSON.get(name, size):
            raise CheckpointError(f"{path / name} is too large to be read: {size} bytes")
    names = {name: _tensor_names(path / name) for name in files if name.endswith(".safetensors")}
    for name, expected in files.items():
        if _fingerprint(path / name) != expected:
            raise CheckpointError(f"{path / name} is damaged: its SHA-256 differs from the manifest's")
    aliases = manifest["aliases"]
    for name, source in aliases.items():
        if source not in names[MODEL] or name in names[MODEL]:
            raise CheckpointError(
                f"{path / MANIFEST} is damaged: it calls {name!r} another name of {source!r}, and {MODEL} has "
                f"{'both' if source in names[MODEL] else 'no such tensor'}"
            )
    training, ranks = read_state(path, "training"), read_state(path, "ranks")
    if not isinstance(training, dict):
        raise CheckpointError(f"{path / 'training.json'} is damaged: it holds no dictionary")
    if (
        not isinstance(ranks, list)
        or len(ranks) != manifest["world_size"]
        or not all(isinstance(x, dict) for x in ranks)
    ):
        raise CheckpointError(
            f"{path / 'ranks.json'} is damaged: it does not hold {manifest['world_size']} ranks' states"
        )
    return Saved(
        path=str(path),
        step=manifest["step"],
        world_size=manifest["world_size"],
        settings=manifest["settings"],
        aliases=aliases,
    )


def read_model(saved: Saved) -> dict[str, Tensor]:
    """Return the model's tensors, each by all of its names.

    Raises:
        CheckpointError: They cannot be read.
    """
    tensors = _load(Path(saved.path) / MODEL)
    return {**tensors, **{name: tensors[source] for name, source in saved.aliases.items()}}


def read_state(path: Path, name: str) -> Any:
    """Return the plain state "training" or "ranks".

    Raises:
        CheckpointError: It cannot be read.
    """
    file = path / f"{name}.json"
    return unpack(
        Packed(from_json(_content(file, _LARGEST_JSON[file.name]), str(file)), _load(path / f"{name}.safetensors")),
        str(file),
    )


def _manifest(path: Path) -> dict[str, Any]:
    file = path / MANIFEST
    try:
        os.lstat(file)
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} is no checkpoint: it has no {MANIFEST}; name a folder like step-00000120"
        ) from None
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error
    text = _content(file, _LARGEST_JSON[MANIFEST])
    _refuse_other_formats(path, text)
    manifest = from_json(text, str(file))
    problem = _problem(manifest, path)
    if problem:
        raise CheckpointError(f"{file} is damaged: {problem}")
    return dict(manifest)


def _problem(manifest: Any, path: Path) -> str:
    """What is wrong with a manifest; "" if nothing is."""
    if not isinstance(manifest, dict):
        return f"it holds a {type(manifest).__name__}"
    missing, extra = [x for x in _KEYS if x not in manifest], [x for x in manifest if x not in _KEYS]
    if missing or extra:
        return f"missing {', '.join(missing) or 'nothing'}, unexpected {', '.join(extra) or 'nothing'}"
    problems = [
        f"{name!r} is {manifest[name]!r:.60}" for name, kind in _KEYS.items() if type(manifest[name]) is not kind
    ]
    return problems[0] if problems else next(filter(None, _contradictions(manifest, path)), "")


def _contradictions(manifest: dict[str, Any], path: Path) -> Iterator[str]:
    """What does not fit in a manifest that has the right keys; "" where it does."""
    step, files = manifest["step"], manifest["files"]
    if step < 0 or manifest["world_size"] < 0:
        yield f"step {step} of {manifest['world_size']} ranks"
    if step_of(path.name) not in (None, step):
        yield f"it is of step {step}, and in the folder {path.name}"
    if not all(type(x) is str for x in manifest["aliases"].values()):
        yield "an alias is no text"
    if set(files) != {*FILES}:
        yield f"it lists the files {', '.join(files) or '(none)'} instead of {', '.join(FILES)}"
    for name, one in files.items():
        if (
            type(one) is not dict
            or set(one) != {"bytes", "sha256"}
            or type(one["bytes"]) is not int
            or type(one["sha256"]) is not str
            or not _SHA256.fullmatch(one["sha256"])
        ):
            yield f"what it says of {name} is {one!r:.60}"
    if manifest["sha256"] != _digest({name: value for name, value in manifest.items() if name != "sha256"}):
        yield "its SHA-256 of itself differs"


def _refuse_other_formats(path: Path, text: bytes) -> None:
    found = re.match(rb'\{\s*"format": (\d+),', text)
    if found and int(found[1]) != FORMAT:
        writer = re.search(rb'"hvdtrain_version": "([\w.+-]+)"', text)
        raise CheckpointError(
            f"{path} has format {int(found[1])}; this hvdtrain {__version__} reads format {FORMAT}. Go on with the hvdtrain that "
            f"wrote it{f' ({writer[1].decode()})' if writer else ''}; its {MODEL} can be read by any program"
        )


def _tensor_names(file: Path) -> set[str]:
    """Looks at the head of a file, and at how it fits the file's size."""
    try:
        with safe_open(file, framework="pt") as content:
            return set(content.keys())
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{file} is damaged: {error}") from error


def _load(file: Path) -> dict[str, Tensor]:
    try:
        tensors = load_file(file)
        with safe_open(file, framework="pt") as content:
            pairs = [name for name in content.metadata() or {} if name in tensors]
        return tensors | {name: torch.view_as_complex(tensors[name]) for name in pairs}
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{file} cannot be read: {type(error).__name__}: {error}") from error


def _content(file: Path, at_most: int) -> bytes:
    with _opened(file) as stream:
        text = stream.read(at_most + 1)
    if len(text) > at_most:
        raise CheckpointError(f"{file} is too large to be read: more than {at_most} bytes")
    return text


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(to_json(manifest)).hexdigest()


def _fingerprint(file: Path) -> dict[str, Any]:
    digest, size = hashlib.sha256(), 0
    with _opened(file) as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
            size += len(block)
    return {"bytes": size, "sha256": digest.hexdigest()}


@contextmanager
def _opened(file: Path) -> Iterator[BinaryIO]:
    """A file's bytes, if it is a plain file; opening any other kind might wait for ever, or do something."""
    _check_kind(file, stat.S_ISREG, "a plain file")
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as stream:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise CheckpointError(f"{file} is not a plain file")
            yield stream
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error


def _check_kind(path: Path, fits: Any, expected: str) -> None:
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} is missing" if expected != "a folder" else f"{path} is no checkpoint: there is no such folder"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not fits(mode):
        raise CheckpointError(f"{path} is {_kind(mode)}, and must be {expected}")


def _kind(mode: int) -> str:
    kinds = {
        stat.S_IFREG: "a file", stat.S_IFDIR: "a folder", stat.S_IFLNK: "a symbolic link", stat.S_IFIFO: "a FIFO",
        stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
    }  # fmt: skip
    return kinds.get(stat.S_IFMT(mode), "of an unknown kind")


def free_space(folder: Path) -> str:
    """How much is free there, in brackets; "" if that cannot be found out."""
    with suppress(OSError):
        return f" ({shutil.disk_usage(folder).free / 2**20:.0f} MiB are free there)"
    return ""
