"""One file that holds a model: safetensors, or what ``torch.save`` writes of plain tensors.

What is read is never allowed to run code: safetensors cannot, and torch's files are read with ``weights_only=True``. That
was breached twice, in torch up to 2.5.1 and again below 2.10, so that an older torch reads no such file unless its user
says that it is trusted.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hvdtrain.errors import CheckpointError
from hvdtrain.training.checkpoint_files import AS_PAIRS

SAFE_TORCH = "2.10"
"""The first torch whose ``weights_only=True`` holds against what is known."""


def write_safetensors(model: Mapping[str, Tensor], file: Path, notes: Mapping[str, str]) -> None:
    """Write tensors under each of their names; where two names share one tensor it is written twice, as the format asks.

    Args:
        model: Dense tensors.
        file: Made anew.
        notes: The file's metadata.

    Raises:
        CheckpointError: The format has no such numbers as a tensor holds.
    """
    for name, value in model.items():
        if value.dtype in AS_PAIRS:
            raise CheckpointError(
                f"{name!r} is of {value.dtype}, which safetensors files cannot hold; give --format torch or dcp"
            )
    save_file({name: value.detach().cpu().contiguous().clone() for name, value in model.items()}, file, dict(notes))


def read_safetensors(file: Path) -> dict[str, Tensor]:
    """Read all tensors.

    Raises:
        CheckpointError: The file is damaged, or of another format.
    """
    try:
        return dict(load_file(file))
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError, AttributeError) as error:
        raise CheckpointError(f"{file} is no whole safetensors file: {error}") from error


def write_torch(found: Mapping[str, Any], file: Path) -> None:
    """Write it by ``torch.save``; tensors that share memory go on sharing it."""
    torch.save(dict(found), file)


def read_torch(file: Path, *, trusted: bool) -> Any:
    """Read a file of ``torch.save`` that holds plain tensors, numbers and text.

    Args:
        file: The file.
        trusted: It comes from a source that may run code here; an old torch reads only such files.

    Raises:
        CheckpointError: It is damaged, holds more than that, or this torch is too old to read it safely.
    """
    check_torch(str(torch.__version__), str(file), trusted=trusted)
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()  # torch looks at no checksum
        if damaged:
            raise CheckpointError(f"{file} is damaged: the checksum of {damaged} in it differs")
        return torch.load(file, map_location="cpu", weights_only=True)
    except zipfile.BadZipFile as error:
        raise CheckpointError(f"{file} is no whole file of torch.save (torch 1.6 or newer): {error}") from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{file} holds more than plain tensors, and nothing is unpickled: {_reason(error)}"
        ) from error
    except Exception as error:  # a damaged archive fails in as many ways as torch.load has lines
        raise CheckpointError(f"{file} cannot be read: {_reason(error)}") from error


def check_torch(version: str, where: str, *, trusted: bool) -> None:
    """Refuse to unpickle, however restricted, where that is known to be unsafe.

    Raises:
        CheckpointError: This torch is older than `SAFE_TORCH`, and the source is not trusted.
    """
    if trusted or torch.torch_version.TorchVersion(version) >= SAFE_TORCH:
        return
    raise CheckpointError(
        f"{where} is read by torch.load(weights_only=True), which up to torch 2.5.1, and again below {SAFE_TORCH}, could be made "
        f"to run code, and this is torch {version}. Use torch {SAFE_TORCH} or newer, convert the file to safetensors, or give "
        "--trusted if nobody else could have written it"
    )


def _reason(error: Exception) -> str:
    """The part of torch's explanation that says what is wrong; the rest advises to trust the file."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    line = next((line for line in lines if "WeightsUnpickler error" in line or "Unsupported" in line), "")
    text = line or (lines[0] if lines else "") or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]}..."
