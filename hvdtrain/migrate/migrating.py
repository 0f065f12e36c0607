"""One script from its file to the new text, in either form."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import libcst as cst

from hvdtrain.errors import ConfigError
from hvdtrain.migrate.imports import imports_moved
from hvdtrain.migrate.own_loop import own_loop
from hvdtrain.migrate.remarks import Remark
from hvdtrain.migrate.source import read


@dataclass(frozen=True, kw_only=True, slots=True)
class Migration:
    """A script and what became of it.

    Attributes:
        path: The file, which was not changed.
        old: As it is.
        new: As it would be.
        remarks: By line.
    """

    path: Path
    old: cst.Module
    new: cst.Module
    remarks: tuple[Remark, ...]

    @property
    def changed(self) -> bool:
        """Whether there is anything to write."""
        return self.old.code != self.new.code

    @property
    def complete(self) -> bool:
        """Whether nothing was left for the user."""
        return not any(remark.yours for remark in self.remarks)

    @property
    def nothing(self) -> str:
        """Why there is nothing to change."""
        if "hvdtrain" in self.old.code:
            return "nothing to change: it imports hvdtrain, and nothing of Horovod's"
        return "nothing to change: it imports nothing of Horovod's"

    def diff(self) -> bytes:
        """What `patch -p1` takes, in the file's own encoding; empty without a change."""
        name = os.fsencode(self.path.as_posix().lstrip("/"))
        if b" " in name:
            name += b"\t"  # where a name ends
        lines = difflib.diff_bytes(
            difflib.unified_diff,
            _lines(self.old),
            _lines(self.new),
            b"a/" + name,
            b"b/" + name,
            lineterm=b"\n",
        )
        whole = [line if line.endswith(b"\n") else line + b"\n\\ No newline at end of file\n" for line in lines]
        return b"".join(whole)


def _lines(module: cst.Module) -> list[bytes]:
    """The lines as `patch` counts them: what else Python takes for a line's end (a form feed, say) is none."""
    return re.findall(rb"[^\n]*\n|[^\n]+", module.bytes)


def scripts(places: Sequence[Path]) -> list[Path]:
    """The files that are meant: each that is named, and the user's own of a folder that name horovod.

    Raises:
        ConfigError: A folder has none.
    """
    found: list[Path] = []
    for place in places:
        if not place.is_dir():
            found.append(place)
            continue
        inside = [file for file in sorted(place.rglob("*.py")) if not _is_others(file, place) and _names_horovod(file)]
        if not inside:
            raise ConfigError(f"{place}: no .py file in this folder names horovod")
        found += inside
    return list(dict.fromkeys(found))


def _is_others(file: Path, place: Path) -> bool:
    """Whether a file of a folder is hidden, or belongs to what is installed in an environment there."""
    inside = file.relative_to(place).parts
    hidden = any(part.startswith(".") for part in inside)
    return hidden or "site-packages" in inside or "dist-packages" in inside


def _names_horovod(file: Path) -> bool:
    try:
        return file.is_file() and b"horovod" in file.read_bytes()
    except OSError:
        return True  # whether it does cannot be known; `read` says why


def migrate(path: Path, *, loop: bool = False) -> Migration:
    """Translate one script.

    Args:
        path: A Python file.
        loop: Rewrite its loop, too.

    Raises:
        ConfigError: It cannot be read; says why.
    """
    old = read(path)
    try:
        new, remarks = own_loop(old) if loop else imports_moved(old)
    except RecursionError as error:
        raise ConfigError(f"{path} is nested too deeply to be translated") from error
    return Migration(path=path, old=old, new=new, remarks=tuple(sorted(set(remarks))))
