"""How the Trainer's loop is saved and goes on: what it has besides what every loop has (`LoopState`)."""

from __future__ import annotations

import logging
from pathlib import Path

from hvdtrain.backends.base import Backend
from hvdtrain.data.rank_batches import RankBatches
from hvdtrain.errors import CheckpointError, ConfigError
from hvdtrain.training.checkpoint import Checkpoints
from hvdtrain.training.checkpoint_files import Saved
from hvdtrain.training.checkup import Tally
from hvdtrain.training.loop_state import LoopState
from hvdtrain.training.position import Position

_log = logging.getLogger(__name__)


def save(state: LoopState, checkpoints: Checkpoints, position: Position, seed: int, *, last: str | None = "") -> str:
    """Write a checkpoint and return its folder; every rank must call it.

    Args:
        state: With the position in it.
        checkpoints: Where to.
        position: This rank's, for its part of the epoch's tally.
        seed: Of the order of the samples.
        last: See `LoopState.save`.
    """
    tally = position.epoch_tally
    of_this_rank = {"tally": [tally.loss_sum, tally.weight], "seed": seed}
    return state.save(checkpoints, position.steps, of_this_rank=of_this_rank, last=last)


def resume(
    state: LoopState,
    which: Saved | Path | str,
    position: Position,
    seed: int,
    backend: Backend,
    batches: RankBatches,
) -> str:
    """Continue from a checkpoint: exactly on as many ranks as it was written by, else with the same global batches.

    Args:
        state: With the position in it.
        which: The checkpoint.
        position: Set to where the checkpoint was written.
        seed: As for `save`; another one than the checkpoint's is warned of.
        backend: All ranks.
        batches: The position must lie between two of its global batches.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: On every rank: it cannot be continued from.
    """
    loaded = state.read(which)
    if loaded is None:
        raise CheckpointError(f"rank 0 was given no checkpoint to resume from, rank {backend.rank} {which}")
    ranks = loaded.rank_states
    if ranks and ranks[0].get("seed", seed) != seed:
        _log.warning("the checkpoint was written with --seed %s, this run has %s", ranks[0]["seed"], seed)
    if len(ranks) == backend.world_size:
        position.epoch_tally = Tally(*ranks[backend.rank]["tally"])
    elif backend.rank == 0:  # the ranks' sum is what counts
        position.epoch_tally = Tally(sum(one["tally"][0] for one in ranks), sum(one["tally"][1] for one in ranks))
    try:
        batches.check_position(position.samples, position.cut)
    except ConfigError as error:
        raise CheckpointError(f"{loaded.path} stopped in the middle of an epoch: {error}") from error
    return loaded.path
