"""A folder of checkpoints holds one line of descent: what one run wrote, and went on from.

What belongs to another line (a run that began anew in the same folder, or went on from an older checkpoint) is set aside in
a folder beside, ``checkpoints.1`` and so on, and never deleted. Moving several folders is made one act by a note of what is
to be moved: what the note names no longer counts, and whoever comes next finishes the work.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from hvdtrain.observe.whole_file import write_whole
from hvdtrain.training.checkpoint_files import flush, remove, step_of

_NOTE = ".setting-aside.json"


def steps(folder: Path) -> dict[int, Path]:
    """The checkpoints of a folder's line, damaged ones included, the oldest first."""
    gone = {*_noted(folder)[1]}
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries]
    found = {step: folder / name for name in names if (step := step_of(name)) is not None and name not in gone}
    return dict(sorted(found.items()))


def set_aside(folder: Path, *, after: int | None, beside: Sequence[Path] = ()) -> tuple[Path, list[str]] | None:
    """Move the checkpoints of another line out of a folder.

    Args:
        folder: Of checkpoints; this process alone may write in it.
        after: The step of the last checkpoint that this line wrote or went on from; None for a line that begins anew.
        beside: Files of the line that is left, copies of which are put with its checkpoints.

    Returns:
        The folder that they are in now, and their names; None if there are none.

    Raises:
        OSError: They could not be moved.
    """
    foreign = [path.name for step, path in steps(folder).items() if after is None or step > after]
    if not foreign:
        return None
    target = _new_folder(folder)
    for file in beside:
        if file.is_file():  # a FIFO would be waited for, and a device may have no end
            (target / file.name).write_bytes(file.read_bytes())
    write_whole(folder / _NOTE, json.dumps({"to": os.path.relpath(target, folder), "names": foreign}))
    flush(folder)
    finish_setting_aside(folder)
    return target, foreign


def finish_setting_aside(folder: Path) -> None:
    """Do what a note in the folder says, if there is one."""
    target, names = _noted(folder)
    for name in names:
        target.mkdir(exist_ok=True)
        with suppress(FileNotFoundError):
            (folder / name).rename(target / name)
    if names:
        flush(target)
        flush(folder)
    (folder / _NOTE).unlink(missing_ok=True)


def thin(folder: Path, keep: int) -> None:
    """Delete all but the newest ones."""
    for path in list(steps(folder).values())[:-keep]:
        remove(path)


def _noted(folder: Path) -> tuple[Path, list[str]]:
    try:
        note = json.loads((folder / _NOTE).read_text())
    except (OSError, ValueError):
        return folder, []
    return folder / note["to"], list(note["names"])


def _new_folder(folder: Path) -> Path:
    """``checkpoints.1`` beside ``checkpoints``, or inside it where that is a file system of its own."""
    number = 1
    place, name = folder.parent, folder.name
    with suppress(OSError):
        if os.stat(folder).st_dev != os.stat(place).st_dev or not os.access(place, os.W_OK):
            place, name = folder, "aside"
    while True:
        target = place / f"{name}.{number}"
        try:
            target.mkdir()
        except FileExistsError:
            number += 1
        else:
            return target
