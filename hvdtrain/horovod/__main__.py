"""Run a Horovod script as it is, on hvdtrain's engines.

::

    torchrun --nproc-per-node 8 -m hvdtrain.horovod train.py --lr 0.1
    mpirun -np 8 python -m hvdtrain.horovod train.py
    python -m hvdtrain.horovod --backend torch -m package.training
"""

from __future__ import annotations

import runpy
import sys
import traceback
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType

from hvdtrain.backends import choose, load
from hvdtrain.cli.voice import complain, say
from hvdtrain.errors import HvdtrainError, LaunchError
from hvdtrain.horovod.importing import install
from hvdtrain.horovod.state import want_backend
from hvdtrain.launch.detect import detect
from hvdtrain.launch.environment import given
from hvdtrain.settings.flags import UsageError

_HELP = """\
usage: python -m hvdtrain.horovod [--backend NAME] SCRIPT|-m MODULE [WORDS ...]

Run a script that imports horovod.torch as it is: the name means
hvdtrain.horovod in it, whether or not Horovod is installed.
  torchrun --nproc-per-node 8 -m hvdtrain.horovod train.py --lr 0.1
  mpirun -np 8 python -m hvdtrain.horovod train.py

  --backend NAME  torch, mpi, local, or horovod, which leaves the script to the
                  real Horovod (auto: by the launcher, or HVDTRAIN_BACKEND)
  -m MODULE       a module instead of a file, as with python -m

hvdtrain migrate SCRIPT changes the import in the script instead.

exit codes: the script's; 1 for its exception; 2 for a wrong command line"""


def main(argv: Sequence[str]) -> int:
    """Reads the words before the script and runs it.

    Returns:
        The exit code, unless the script ends in an exception of its own.
    """
    try:
        if list(argv[:1]) in (["--help"], ["-h"]):
            say(_HELP)
            return 0
        backend, words = _backend(list(argv))
        as_module, words = (True, words[1:]) if words[:1] == ["-m"] else (False, words)
        if not words:
            raise UsageError("name a script: python -m hvdtrain.horovod train.py, or -m and a module")
        if words[0].startswith("-"):
            raise UsageError(
                f"unknown flag {words[0]}; what is meant for the script follows its name; --help shows all"
            )
        if not as_module and not Path(words[0]).is_file():
            raise UsageError(f"{words[0]} is no file that could be run")
        if as_module and find_spec(words[0].split(".")[0]) is None:
            raise UsageError(f"no module named {words[0]!r} can be found from this folder")
        if _engine(backend) != "horovod":
            install()
    except HvdtrainError as error:
        complain(error, same_everywhere=isinstance(error, UsageError))
        return error.exit_code
    sys.argv = list(words)
    sys.excepthook = _show
    if as_module:
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(words[0]).resolve().parent)
        runpy.run_path(words[0], run_name="__main__")
    return 0


def _backend(words: list[str]) -> tuple[str | None, list[str]]:
    """The engine that was asked for, and the words from the script on."""
    name, equals, value = words[0].partition("=") if words else ("", "", "")
    if name != "--backend":
        return None, words
    if equals:
        return value, words[1:]
    if len(words) < 2:
        raise UsageError("--backend needs a name: torch, mpi, horovod, local or auto")
    return words[1], words[2:]


def _engine(asked: str | None) -> str:
    """The name of the engine that will work; `hvdtrain.horovod.init` takes the same."""
    wanted = asked or given("HVDTRAIN_BACKEND") or "auto"
    name = choose(detect(), wanted)[0]
    missing = load(name).unusable()
    if missing:
        raise LaunchError(f"backend {name!r}: {missing}")
    want_backend(wanted)
    return name


def _show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """The script's own traceback, without the frames that ran it."""
    ours = (__file__, runpy.__file__, "<frozen runpy>")
    while trace is not None and trace.tb_next is not None and trace.tb_frame.f_code.co_filename in ours:
        trace = trace.tb_next
    traceback.print_exception(kind, error, trace)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
