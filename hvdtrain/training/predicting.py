"""A model's outputs for a data set, in its order, each sample once.

The data is cut as in training: in each round the ranks compute one run of samples, a piece each. What they found goes to those
who hold it after every few rounds, so that no rank ever has much more than the pieces of these.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import nn

from hvdtrain.backends.communicator import Communicator
from hvdtrain.backends.replica import Replica
from hvdtrain.data.nested import memory_bytes
from hvdtrain.data.rank_batches import RankBatches
from hvdtrain.errors import ConfigError, OutputError
from hvdtrain.training.inference import inference
from hvdtrain.training.lone_sample import batches_without_samples_explained
from hvdtrain.training.outputs import Outputs, difference, taken_apart
from hvdtrain.training.precision import Precision
from hvdtrain.training.prediction_store import InFolder, InMemory, Store

_EXCHANGE_BYTES = 32 * 2**20  # of a rank
_MOST_ROUNDS = 64  # between two exchanges

Piece = tuple[int, Outputs] | None  # how many samples a rank had in a round, and their outputs


def predict(
    communicator: Communicator,
    replica: Replica,
    task: object,
    precision: Precision,
    batches: RankBatches,
    to: Path | str,
) -> Any:
    """Compute the outputs of all samples; every rank must call it.

    Args:
        communicator: All ranks.
        replica: Its inference model is called, in evaluation mode, with rank 0's buffers.
        task: Its ``predict(model, batch)`` is called if it has one; else the model, with the batch, or with the first part of a
            tuple or list.
        precision: Of the forward pass.
        batches: Of the data set in its order.
        to: "rank0", "all", or the folder of files.

    Returns:
        The outputs on the ranks that have them, None on others; the folder.

    Raises:
        ConfigError: On every rank: outputs of some rank do not show what belongs to which sample, or differ between batches.
        OutputError: On every rank: the files cannot be written.
    """
    collecting = Collecting(communicator, batches.partition.length, to)
    call = getattr(task, "predict", _call)
    rounds = len(batches)
    try:
        with inference(replica) as model:
            for number, step in enumerate(batches.steps(0), 1):
                piece: Piece = None
                for loaded, samples in step:
                    with precision.autocast(), batches_without_samples_explained(samples):
                        output = call(model, precision.cast(loaded))
                    if samples:
                        piece = collecting.piece(output, samples)
                collecting.add(piece, last=number == rounds)
        return collecting.result()
    except BaseException:
        collecting.give_up()
        raise


def destination(to: Path | str) -> str:
    """Return "rank0", "all" or "folder".

    Raises:
        ConfigError: It may be a misspelt one of the first two.
    """
    if not isinstance(to, str | Path):
        raise ConfigError(f"to={to!r} must be 'rank0', 'all' or the path of a folder, and is a {type(to).__name__}")
    if to in ("rank0", "all"):
        return str(to)
    if isinstance(to, str) and not os.path.dirname(to):
        raise ConfigError(f"to={to!r} is neither 'rank0' nor 'all'; for a folder of that name give './{to}' or a Path")
    return "folder"


class Collecting:
    """Brings the ranks' pieces to those who hold them.

    Args:
        communicator: All ranks.
        samples: How many there will be, over all ranks.
        to: See `predict`.
        exchange_bytes: About how much a rank keeps before it is sent.

    Raises:
        OutputError: On every rank: the folder cannot be written.
    """

    def __init__(
        self, communicator: Communicator, samples: int, to: Path | str, *, exchange_bytes: int = _EXCHANGE_BYTES
    ) -> None:
        self._communicator = communicator
        self._to_all, self._in_folder = destination(to) == "all", destination(to) == "folder"
        self._exchange_bytes = exchange_bytes
        self._problem = ""
        self._pieces: list[Piece] = []
        self._rounds = 1  # until the next exchange
        self._first: Outputs | None = None
        self._store: Store | None = None
        if self._to_all or communicator.wire.rank == 0:
            try:
                self._store = InFolder(Path(to), samples) if self._in_folder else InMemory(samples)
            except OutputError as error:
                self._problem = str(error)
        self._agree(OutputError)

    def piece(self, output: Any, samples: int) -> Piece:
        """Return a batch's outputs; what is wrong with them is told at the next exchange."""
        try:
            return samples, taken_apart(output, samples)
        except ConfigError as error:
            self._problem = self._problem or f"{error} (on rank {self._communicator.wire.rank})"
            return None

    def add(self, piece: Piece, *, last: bool) -> None:
        """A round is done; every rank must call it.

        Raises:
            ConfigError: On every rank: outputs of some rank are no such, or do not fit to the others.
            OutputError: On every rank: they cannot be written.
        """
        self._pieces.append(piece)
        if len(self._pieces) < self._rounds and not last:
            return
        mine = (self._problem, self._pieces)
        everyone = (
            self._communicator.all_gather_object(mine) if self._to_all else self._communicator.gather_object(mine)
        )
        self._pieces = []
        kind: type[ConfigError | OutputError] = ConfigError
        if everyone is not None:
            self._problem = next((problem for problem, _ in everyone if problem), "")
            try:
                if not self._problem:
                    self._keep([pieces for _, pieces in everyone])
            except (ConfigError, OutputError) as error:
                self._problem, kind = str(error), type(error)
        self._agree(kind)

    def result(self) -> Any:
        """Return what the user gets, after the last round; every rank must call it."""
        found = None
        if self._store is not None:
            try:
                found = self._store.result()
            except OutputError as error:
                self._problem = str(error)
        self._agree(OutputError)
        return self._communicator.broadcast_object(found) if self._in_folder else found

    def give_up(self) -> None:
        """Leave nothing behind."""
        if self._store is not None:
            self._store.give_up()

    def _keep(self, everyone: list[list[Piece]]) -> None:
        assert self._store is not None
        most = 1
        for of_round in zip(*everyone, strict=True):
            for rank, piece in enumerate(of_round):
                if piece is None:
                    continue
                samples, outputs = piece
                self._first = self._first or outputs
                differing = difference(self._first, outputs)
                if differing:
                    raise ConfigError(
                        f"predictions differ between batches: {differing} (on rank {rank}). Give all batches one form, for example by "
                        "padding, or return a list with an entry for each sample"
                    )
                self._store.add(outputs, samples)
                most = max(most, memory_bytes(outputs.columns))
        self._rounds = max(1, min(_MOST_ROUNDS, self._exchange_bytes // most))

    def _agree(self, kind: type[ConfigError | OutputError]) -> None:
        """Know whether it went well where the outputs are kept, and after how many rounds the next exchange is."""
        problem, kind, self._rounds = self._communicator.broadcast_object((self._problem, kind, self._rounds))
        if problem:
            raise kind(problem)


def _call(model: nn.Module, batch: Any) -> Any:
    return model(batch[0] if isinstance(batch, tuple | list) else batch)
