"""One script from its file to the new text, in either form."""

from __future__ import annotations

import difflib
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

    def diff(self) -> str:
        """What `patch -p1` takes, "" without a change."""
        name = self.path.as_posix().lstrip("/")
        lines = difflib.unified_diff(
            self.old.code.splitlines(keepends=True), self.new.code.splitlines(keepends=True), f"a/{name}", f"b/{name}"
        )
        whole = [line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n" for line in lines]
        return "".join(whole)


def scripts(places: Sequence[Path]) -> list[Path]:
    """The files that are meant: each that is named, and those of a folder that name horovod.

    Raises:
        ConfigError: A folder has none.
    """
    found: list[Path] = []
    for place in places:
        if not place.is_dir():
            found.append(place)
            continue
        inside = [
            file
            for file in sorted(place.rglob("*.py"))
            if not any(part.startswith(".") for part in file.relative_to(place).parts) and _names_horovod(file)
        ]
        if not inside:
            raise ConfigError(f"{place}: no .py file in this folder names horovod")
        found += inside
    return list(dict.fromkeys(found))


def _names_horovod(file: Path) -> bool:
    try:
        return b"horovod" in file.read_bytes()
    except OSError:
        return False


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
