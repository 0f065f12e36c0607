"""Start ranks from a script or a notebook, without a launcher.

The function travels by value (cloudpickle), so one defined in a notebook cell or in ``__main__`` works; the results come
back the same way. Ranks are ordinary processes of this machine that end with the caller.

What ranks print arrives in the cell. A progress line of theirs is shown by the caller, as an output of its own that is
replaced: ranks put its newest text into a file.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import linecache
import math
import os
import pickle
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import cloudpickle

from hvdtrain import notebook
from hvdtrain.backends import create, load, names
from hvdtrain.errors import ConfigError, RankFailure
from hvdtrain.launch.launchers import spawned
from hvdtrain.parcels import packed
from hvdtrain.ranks.describing import EndedAsVictim, traced

_PREFIX = "hvdtrain-spawn-"
_HELD = "held-by-its-caller"  # a file that is there only while it is locked, or when its caller was killed
_GRACE_S = 10.0  # how long ranks may outlive the first failure


def spawn(
    fn: Callable[..., Any],
    nprocs: int,
    backend: str = "torch",
    args: Sequence[Any] = (),
    *,
    limit_s: float | None = None,
    **options: Any,
) -> list[Any]:
    """Run ``fn(backend, *args)`` on ``nprocs`` ranks of this machine, each in its own process.

    Args:
        fn: Called with the started backend first. Any function that cloudpickle can send, one of a notebook's cell too. Each
            rank has its own copy of what it uses: a model of the caller's is not trained, but returned.
        nprocs: Number of ranks.
        backend: Name of the backend; "local" serves one rank.
        args: Further arguments; pickled.
        limit_s: End the ranks after this many seconds; None for no limit.
        options: For `hvdtrain.init`, such as ``device="cpu"`` or ``timeout_s=60``, the longest wait for another rank.

    Returns:
        What ``fn`` returned on each rank, in rank order.

    Raises:
        RankFailure: A rank raised, exited or was killed; the message holds the first failing rank's traceback.
        ConfigError: ``fn`` or an argument cannot be pickled, and which part of it; or a number of ranks or seconds, or a
            backend, that cannot be.
    """
    if nprocs < 1:
        raise ConfigError(f"spawn needs at least one rank, got nprocs={nprocs}")
    if limit_s is not None and not 0 < limit_s < math.inf:
        raise ConfigError(f"spawn's limit_s must be a positive number of seconds, or None, got {limit_s!r}")
    if backend not in ("auto", *names()):
        load(backend)  # says which there are
    call = packed(
        {f"{getattr(fn, '__name__', 'fn')}()": fn, "args": tuple(args), "backend": backend, "options": options},
        "spawn's ranks are other processes; make it inside the function, on each rank",
    )
    job = secrets.token_hex(8)
    with _exchange_folder() as folder:
        (folder / "call").write_bytes(call)
        look = _look_nowhere
        if notebook.is_here():
            look = notebook.FollowedLine(folder / "cell-line").look
            (folder / "cells").write_bytes(pickle.dumps(notebook.sources()))
        (folder / "path").write_text("\0".join(sys.path))
        ranks: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(nprocs):
                ranks.append(_start(folder, rank, nprocs, job))
            _wait(ranks, folder, limit_s, look)
        finally:
            _end(ranks)
        return [pickle.loads((folder / f"result-{rank}").read_bytes())[0] for rank in range(nprocs)]


@contextlib.contextmanager
def _exchange_folder() -> Iterator[Path]:
    """A folder for what travels to the ranks and back; those of callers that were killed are removed, too."""
    for other in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        _remove_if_left(other)
    with tempfile.TemporaryDirectory(prefix=_PREFIX) as name:
        folder = Path(name)
        with (folder / "not-yet-held").open("wb") as held:
            with contextlib.suppress(OSError):  # a file system without locks: such a folder stays
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                Path(held.name).rename(folder / _HELD)
            yield folder


def _remove_if_left(folder: Path) -> None:
    """Remove another call's folder if nobody holds it any more: the kernel's lock ends with the process."""
    with contextlib.suppress(OSError):
        if folder.lstat().st_uid != os.geteuid():
            return
        with (folder / _HELD).open("rb") as held:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)


def _look_nowhere() -> None: ...


def _start(folder: Path, rank: int, nprocs: int, job: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, **spawned(rank, nprocs, job)}
    # As torchrun does: N ranks with a thread per core each would be slower than one.
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // nprocs)))
    return subprocess.Popen(
        [sys.executable, "-c", "from hvdtrain.workers import _main; _main()", str(folder), str(rank), str(os.getpid())],
        env=environment,
        stdin=subprocess.DEVNULL,
    )


def _wait(ranks: list[subprocess.Popen[bytes]], folder: Path, limit_s: float | None, look: Callable[[], None]) -> None:
    end = None if limit_s is None else time.monotonic() + limit_s
    failed_at: float | None = None
    ended: dict[int, float] = {}  # when each was seen to have ended; the first of them first
    while any(process.poll() is None for process in ranks):
        now = time.monotonic()
        if end is not None and now > end:
            late = [rank for rank, process in enumerate(ranks) if process.poll() is None]
            raise RankFailure(f"ranks {late} were still running after {limit_s:g} s and were ended")
        _note_ends(ranks, ended)
        if failed_at is None and any(not _has_returned(rank, ranks, folder) for rank in ended):
            failed_at = now
        if failed_at is not None and now > failed_at + _GRACE_S:
            break
        look()
        time.sleep(0.01)
    look()
    _note_ends(ranks, ended)
    fallen = [rank for rank in ended if not _has_returned(rank, ranks, folder)]
    if not fallen:
        return
    fallen.sort(key=lambda rank: (folder / f"victim-{rank}").exists())  # they may be seen to end together
    told = min(folder.glob("error-*"), key=lambda file: file.stat().st_mtime_ns, default=None)
    # The first that ended is the cause; one that raised ends after it has told the others, and they may be quicker then.
    if told is not None and not (ranks[fallen[0]].returncode < 0 and ended[fallen[0]] < told.stat().st_mtime):
        rank = int(told.name.removeprefix("error-"))
        text = told.read_text()
        raise RankFailure(f"rank {rank} of {len(ranks)} failed:\n\n{text}", rank=rank, rank_traceback=text)
    rank = fallen[0]
    raise RankFailure(
        f"rank {rank} of {len(ranks)} ended with {_describe(ranks[rank].returncode)} and left no traceback", rank=rank
    )


def _note_ends(ranks: list[subprocess.Popen[bytes]], ended: dict[int, float]) -> None:
    new = [rank for rank, process in enumerate(ranks) if rank not in ended and process.poll() is not None]
    for rank in sorted(new, key=lambda rank: ranks[rank].returncode):  # a signal from outside comes first
        ended[rank] = time.time()


def _has_returned(rank: int, ranks: list[subprocess.Popen[bytes]], folder: Path) -> bool:
    return ranks[rank].returncode == 0 and (folder / f"result-{rank}").exists()


def _describe(code: int) -> str:
    if code < 0:
        return f"signal {-code}, {signal.strsignal(-code)}"
    return f"exit code {code}{'' if code else ' before its function had returned'}"


def _end(ranks: list[subprocess.Popen[bytes]]) -> None:
    for process in ranks:
        if process.poll() is None:
            process.terminate()
    end = time.monotonic() + 3
    try:
        for process in ranks:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, end - time.monotonic()))
    finally:  # after a second Ctrl-C too
        for process in ranks:
            process.kill()
        for process in ranks:
            process.wait()


def _main() -> None:
    """One rank."""
    folder, rank, caller = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    _end_with(caller)
    try:
        sys.path[:] = (folder / "path").read_text().split("\0")
        if (folder / "cells").exists():  # the caller is a notebook
            linecache.cache.update(pickle.loads((folder / "cells").read_bytes()))
            notebook.show_in_callers_cell = lambda text: _write(folder / "cell-line", text.encode())
        fn, args, backend, options = cloudpickle.loads((folder / "call").read_bytes())
        with create(backend, **options) as running:
            result = fn(running, *args)
        _write(folder / f"result-{rank}", packed({"result": result}, "return numbers, tensors or a state_dict"))
    except EndedAsVictim:
        with contextlib.suppress(OSError):  # the disk is full
            (folder / f"victim-{rank}").touch()
        raise
    except SystemExit:  # the function wanted it
        raise
    except BaseException as error:
        text = traced(error)
        try:
            _write(folder / f"error-{rank}", text.encode(errors="backslashreplace"))
        except OSError:  # the disk is full
            print(text, file=sys.stderr, flush=True)  # noqa: T201 - last words
        sys.exit(1)


def _write(file: Path, content: bytes) -> None:
    temporary = file.with_name(f"partial-{file.name}")
    temporary.write_bytes(content)
    temporary.replace(file)


def _end_with(caller: int) -> None:
    """Ask the kernel to end this process when the caller is gone, however it went."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    if os.getppid() != caller:
        sys.exit(1)
