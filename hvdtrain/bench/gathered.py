"""What the ranks of one launch have written: a JSON file each."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from hvdtrain.errors import ConfigError


def write_own(folder: Path, rank: int, found: Any) -> None:
    """One rank's part."""
    (folder / f"rank{rank}.json").write_text(json.dumps(found))


def read_ranks(folder: Path, ranks: int) -> list[Any]:
    """All parts, in the order of the ranks.

    Raises:
        ConfigError: Not every rank wrote its part.
    """
    try:
        return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(ranks)]
    except (OSError, ValueError) as error:
        raise ConfigError(f"not all of {ranks} ranks wrote their times: {error}") from error


def slowest(of_ranks: Iterable[Sequence[float]]) -> list[float]:
    """Of times that every rank took, call by call, the longest."""
    return [max(each) for each in zip(*of_ranks, strict=True)]
