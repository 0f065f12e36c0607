"""What is different where the caller is a notebook: its cells are no files, and a line of a cell's output can be replaced.

Nothing here needs IPython unless a notebook runs.
"""

from __future__ import annotations

import linecache
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

show_in_callers_cell: Callable[[str], object] | None = None
"""On a rank of `spawn`: shows a text as the progress line of the cell that called it; None where the caller is no notebook."""


def is_here() -> bool:
    """Whether this process is the kernel of a notebook."""
    shell = sys.modules.get("IPython")
    return shell is not None and getattr(shell.get_ipython(), "kernel", None) is not None


class CellLine:
    """An output of the running cell whose text is replaced. It stays: it says how far the work came."""

    def __init__(self) -> None:
        self._handle: Any = None

    def show(self, text: str) -> None:
        """Show this text in the place of the last."""
        content = {"text/plain": text}
        if self._handle is None:
            self._handle = sys.modules["IPython"].display.display(content, raw=True, display_id=True)
        else:
            self._handle.update(content, raw=True)


class FollowedLine:
    """Shows what another process put into a file.

    Args:
        file: Need not exist yet; replaced as a whole.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._line = CellLine()
        self._shown = ""

    def look(self) -> None:
        """Show it, if it is new."""
        text = self._file.read_text() if self._file.exists() else ""
        if text != self._shown:
            self._line.show(text)
            self._shown = text


def sources() -> dict[str, Any]:
    """The source of this notebook's cells as `linecache` has it, for tracebacks in other processes."""
    return {name: entry for name, entry in linecache.cache.items() if len(entry) == 4 and entry[1] is None}
