"""``hvdtrain migrate``: a Horovod script with hvdtrain's imports, or with a loop of its own."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hvdtrain.cli.voice import complain, say, show
from hvdtrain.errors import ConfigError
from hvdtrain.settings.flags import UsageError
from hvdtrain.settings.wording import did_you_mean

if TYPE_CHECKING:
    from hvdtrain.migrate.migrating import Migration

_HELP = """\
usage: hvdtrain migrate [--own-loop] [--write] SCRIPT|FOLDER [...]

Show how a script that imports horovod.torch becomes one of hvdtrain's, as a
diff on the standard output. What it cannot translate is listed on the standard
error, with the line and the page that explains it.
  hvdtrain migrate train.py               import hvdtrain.horovod as hvd
  hvdtrain migrate --own-loop train.py    backend.loader, replica.step() ...
  python -m hvdtrain.horovod train.py     runs it without any change

  --own-loop  rewrite the loop, too: init, sampler, wrapped optimizer,
              broadcasts, backward and step
  --write     change the files; without it nothing is written. A file with
              lines left for you is written with --own-loop only by patch:
              hvdtrain migrate --own-loop train.py | patch -p1
  a folder    is searched for .py files that name horovod, without what is
              hidden or installed there (site-packages)

exit codes:
  0    translated, or nothing to do
  1    some lines are left for you
  2    wrong flag, or a file that cannot be read or written"""
_FLAGS = ("--own-loop", "--write", "--help", "-h")


def run(argv: Sequence[str]) -> int:
    """Reads the words, shows the diffs and writes the files.

    Returns:
        The exit code, as the help has it.

    Raises:
        HvdtrainError: Wrong words, a folder without scripts, or libcst is missing.
    """
    words = list(argv)
    flags = {word for word in words if word.startswith("-") and word != "--"}
    for flag in sorted(flags - set(_FLAGS)):
        raise UsageError(f"unknown flag {flag}{did_you_mean(flag, _FLAGS) or '; --help shows all'}")
    if flags & {"--help", "-h"}:
        say(_HELP)
        return 0
    places = [Path(word) for word in words if word not in flags and word != "--"]
    if not places:
        raise UsageError("migrate needs a script: hvdtrain migrate train.py")
    try:
        from hvdtrain.migrate.migrating import migrate, scripts  # noqa: PLC0415  (libcst is an extra)
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("libcst"):
            raise
        raise ConfigError("hvdtrain migrate needs libcst; pip install 'hvdtrain[migrate]'") from error
    code = 0
    for path in scripts(places):
        try:
            migration = migrate(path, loop="--own-loop" in flags)
            code = max(code, _report(migration, write="--write" in flags, loop="--own-loop" in flags))
        except ConfigError as error:
            complain(error, same_everywhere=True)
            code = error.exit_code
    return code


def _report(migration: Migration, *, write: bool, loop: bool) -> int:
    """Says what became of one script, and writes it if that was asked for and can be."""
    from hvdtrain.migrate.source import write as write_file  # noqa: PLC0415

    path = migration.path
    for remark in migration.remarks:
        what = "yours" if remark.yours else "note"
        sys.stderr.write(f"{path}:{remark.line}: {what}: {remark.text} ({remark.page})\n")
    if not migration.changed:
        if migration.complete:
            sys.stderr.write(f"{path}: {migration.nothing}\n")
        return 0 if migration.complete else 1
    if not write:
        show(migration.diff())
    elif migration.complete or not loop:
        write_file(path, migration.new)
        sys.stderr.write(f"{path}: written\n")
    else:
        sys.stderr.write(f"{path}: not written, because lines are left for you\n")
    return 0 if migration.complete else 1
