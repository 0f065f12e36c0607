"""A language model of the bytes of a text file, from nothing but the file.

``python -m hvdtrain --task hvdtrain.tasks.byte_language_model:ByteLanguageModel --task.file book.txt --optimizer AdamW --lr 1e-3``
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from hvdtrain.errors import ConfigError, DataError

BYTES = 256
NOTHING = -100  # a target that does not count


class ByteLanguageModel:
    """Predict each byte of a text from those before it, with a causal transformer.

    The text is cut into windows that do not overlap; a window's first byte is only read. The loss is the mean over the
    predicted bytes (nats), also where windows differ in length.

    Args:
        file: The text, in any encoding. It is read a window at a time.
        context: Most bytes that a prediction looks at.
        width: Of the model; a multiple of ``heads``.
        layers: Of the model.
        heads: Of attention.
        dropout: Probability, in training.
        eval_fraction: The part at the end of the file that is for evaluation; 0 for none.

    Raises:
        ConfigError: A value that cannot work.
        DataError: The file cannot be read, or is too short.
    """

    def __init__(
        self,
        file: str,
        context: int = 256,
        width: int = 128,
        layers: int = 4,
        heads: int = 4,
        dropout: float = 0.0,
        eval_fraction: float = 0.1,
    ) -> None:
        for name, value in (("context", context), ("width", width), ("layers", layers), ("heads", heads)):
            if value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value} (--task.{name})")
        if width % heads:
            raise ConfigError(
                f"width must be a multiple of heads, got {width} and {heads} (--task.width, --task.heads)"
            )
        for name, part in (("dropout", dropout), ("eval_fraction", eval_fraction)):
            if not 0 <= part < 1:
                raise ConfigError(f"{name} must be at least 0 and less than 1, got {part}")
        self._file = Path(file).expanduser().absolute()
        length = _length(self._file)
        held = math.ceil(length * eval_fraction)
        if length - held < 2 or held == 1:
            raise DataError(
                f"{file} has {length} bytes, {length - held} to train and {held} to evaluate on (--task.eval_fraction {eval_fraction:g}), too "
                "few to predict one from another; name a longer text (--task.file)"
            )
        self._context = context
        self._shape = {"context": context, "width": width, "layers": layers, "heads": heads, "dropout": dropout}
        self._train, self._evaluation = range(length - held), range(length - held, length)

    def build_model(self) -> nn.Module:
        """Return a new model."""
        return CausalTransformer(**self._shape)  # type: ignore[arg-type]

    def train_data(self) -> Dataset[Any]:
        """Return the windows of the file's first part."""
        return Windows(self._file, self._train, self._context)

    def eval_data(self) -> Dataset[Any] | None:
        """Return the windows of the file's last part."""
        return Windows(self._file, self._evaluation, self._context) if len(self._evaluation) else None

    def collate(self, windows: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the bytes that are read and those that follow them, both (windows, positions), padded at the end."""
        read = pad_sequence([window[:-1] for window in windows], batch_first=True)
        following = pad_sequence([window[1:] for window in windows], batch_first=True, padding_value=NOTHING)
        return read, following

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return the mean cross-entropy of the bytes that follow, in nats."""
        read, following = batch
        return cross_entropy(_wide(model(read)).flatten(0, 1), following.flatten(), ignore_index=NOTHING)

    def weight_of(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return how many bytes are predicted."""
        return (batch[1] != NOTHING).sum()

    def metrics(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Mapping[str, Tensor]:
        """Return the loss, the same in bits, and how often the likeliest byte is right."""
        read, following = batch
        scores = _wide(model(read))
        loss = cross_entropy(scores.flatten(0, 1), following.flatten(), ignore_index=NOTHING)
        right = (scores.argmax(-1) == following)[following != NOTHING]
        return {"loss": loss, "bits_per_byte": loss / math.log(2), "accuracy": right.double().mean()}


def _wide(scores: Tensor) -> Tensor:
    """Sixteen bits are too few to sum 256 exponentials in."""
    return scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores


class Windows(Dataset[Tensor]):
    """A part of a file in windows of at most ``context`` predictions.

    Each item is the bytes of one window, int64 (2 to context + 1,); the last byte of one is the first of the next.
    """

    def __init__(self, file: Path, part: range, context: int) -> None:
        self._file, self._part, self._context = file, part, context

    def __len__(self) -> int:
        return (len(self._part) + self._context - 2) // self._context

    def __getitem__(self, index: int) -> Tensor:
        if not 0 <= index < len(self):
            raise IndexError(index)
        begin = index * self._context
        wanted = self._part[begin : begin + self._context + 1]
        try:  # not mapped into memory: to read there what has been cut off ends the process
            found = np.fromfile(self._file, np.uint8, len(wanted), offset=wanted.start)
        except OSError as error:
            raise DataError(f"{self._file} cannot be read any more ({error})") from error
        if len(found) < len(wanted):
            raise DataError(f"{self._file} has become shorter since training began; leave the text alone meanwhile")
        return torch.from_numpy(found.astype(np.int64))


class CausalTransformer(nn.Module):
    """Scores for the next byte at every position: (windows, positions) to (windows, positions, 256)."""

    def __init__(self, context: int, width: int, layers: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.bytes = nn.Embedding(BYTES, width)
        self.positions = nn.Embedding(context, width)
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, layers, norm=nn.LayerNorm(width), enable_nested_tensor=False)
        self.scores = nn.Linear(width, BYTES)

    def forward(self, read: Tensor) -> Tensor:
        """Return the scores; a position sees itself and those before it."""
        length = read.shape[1]
        x = self.bytes(read) + self.positions(torch.arange(length, device=read.device))
        later = torch.ones(length, length, dtype=torch.bool, device=read.device).triu(1)
        scores: Tensor = self.scores(self.layers(x, mask=later, is_causal=True))
        return scores


def _length(file: Path) -> int:
    if not file.is_file():
        raise DataError(f"there is no file {file}; name a text with --task.file")
    try:
        with file.open("rb") as text:
            return text.seek(0, os.SEEK_END)
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error}); name a text with --task.file") from error
