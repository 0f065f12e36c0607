"""Finished wheels, kept so that the next environment installs in seconds.

A wheel's name carries the key of its plan as the build number, so that one folder holds many and pip takes any of them:
``horovod-0.28.1-1_3f0c….whl``. Beside each lies its SHA-256, written after it: a wheel without one was not finished.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from hvdtrain.backends.hvd.stamp import FILE, Stamp
from hvdtrain.file_lock import LockTimeout, lock
from hvdtrain.horovod_build.failure import BuildError
from hvdtrain.horovod_build.private_folder import check_private, make_private

LOCK_S = 7200.0
"""How long to wait for another build of the same wheel."""


def folder(wheel_dir: str | None, environment: Mapping[str, str]) -> Path:
    """Where finished wheels are: ``--wheel-dir``, else below `cache`."""
    return _absolute(wheel_dir) if wheel_dir else cache(environment) / "wheels"


def cache(environment: Mapping[str, str]) -> Path:
    """The user's cache of hvdtrain: $HVDTRAIN_CACHE, $XDG_CACHE_HOME/hvdtrain, or ~/.cache/hvdtrain."""
    if environment.get("HVDTRAIN_CACHE"):
        return _absolute(environment["HVDTRAIN_CACHE"])
    base = environment.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "hvdtrain"


def _absolute(path: str) -> Path:
    return Path(os.path.abspath(Path(path).expanduser()))  # links are left as they are: whose they are is asked later


def find(wheels: Path, stamp: Stamp) -> tuple[Path | None, str]:
    """The finished wheel of a plan.

    Returns:
        The wheel, or None; and if there is one that is damaged, what is wrong with it.

    Raises:
        BuildError: Somebody else could have put it there.
    """
    check_private(wheels)
    for wheel in sorted(wheels.glob(f"horovod-{stamp.horovod}-1_{stamp.key}-*.whl")):
        check_private(wheel)
        problem = _damage(wheel, stamp)
        return (None, f"{wheel}: {problem}") if problem else (wheel, "")
    return None, ""


def keep(built: Path, wheels: Path, stamp: Stamp) -> Path:
    """Put a wheel among the finished ones: written beside, then renamed.

    Raises:
        BuildError: It is not what was planned, or the folder cannot be written.
    """
    problem = _content_damage(built, stamp)
    if problem:
        raise BuildError(f"the build made a wheel that cannot be right: {problem}")
    name, version, *tags = built.name.split("-")
    target = wheels / "-".join([name, version, f"1_{stamp.key}", *tags])
    beside = target.with_name(f".{target.name}.{os.getpid()}")
    check = _check_file(target)
    make_private(wheels)
    try:
        check.unlink(missing_ok=True)
        shutil.copyfile(built, beside)
        beside.chmod(0o644)
        os.replace(beside, target)
        check_beside = check.with_name(f".{check.name}.{os.getpid()}")
        check_beside.write_text(f"{_sha256(target)}  {target.name}\n")
        os.replace(check_beside, check)
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise BuildError(
            f"{wheels} cannot be written ({error.strerror}); name another folder by --wheel-dir"
        ) from error
    return target


@contextlib.contextmanager
def locked(wheels: Path, key: str, *, waiting: Callable[[], None], limit_s: float = LOCK_S) -> Iterator[None]:
    """Hold the lock of one plan: of two that would build the same wheel, the second waits and finds it made.

    Args:
        wheels: The folder.
        key: Of the plan.
        waiting: Called once if another holds it.
        limit_s: Seconds to wait.

    Raises:
        BuildError: The folder cannot be written, or the time is up.
    """
    path = wheels / f".{key}.lock"
    make_private(wheels)
    try:
        file = path.open("w")
    except OSError as error:
        raise BuildError(
            f"{wheels} cannot be written ({error.strerror}); name another folder by --wheel-dir"
        ) from error
    with file:
        try:
            # Some network file systems have no locks: better without than not at all, for wheels are renamed into place.
            with contextlib.suppress(OSError):
                lock(file.fileno(), timeout_s=limit_s, waiting=waiting)
        except LockTimeout as error:
            raise BuildError(
                f"another build holds {path} since more than {limit_s:.0f} s; end it, then try again"
            ) from error
        yield


def _check_file(wheel: Path) -> Path:
    return wheel.with_name(wheel.name + ".sha256")


def _damage(wheel: Path, stamp: Stamp) -> str:
    """What is wrong with a finished wheel; "" if nothing."""
    try:
        expected = _check_file(wheel).read_text().split()[0]
    except (OSError, IndexError):
        return "its checksum is missing"
    if _sha256(wheel) != expected:
        return "its checksum is wrong"
    return _content_damage(wheel, stamp)


def _content_damage(wheel: Path, stamp: Stamp) -> str:
    try:
        with zipfile.ZipFile(wheel) as file:
            names = set(file.namelist())
            found = Stamp.parse(file.read(f"horovod/{FILE}").decode()) if f"horovod/{FILE}" in names else None
    except (OSError, zipfile.BadZipFile, UnicodeDecodeError) as error:
        return f"it cannot be read ({error})"
    extension = f"horovod/torch/mpi_lib_v2{stamp.python}"
    if extension not in names:
        return f"{extension} is missing"
    if found is None or found.key != stamp.key:
        return "its stamp is missing, or another plan's"
    return ""


def _sha256(path: Path) -> str:
    total = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            total.update(part)
    return total.hexdigest()
