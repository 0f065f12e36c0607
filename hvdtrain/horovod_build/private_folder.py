"""Whether a folder that finished wheels are taken from can be written by anybody else.

A wheel is code that will run as this user. ``HVDTRAIN_CACHE=/tmp/cache`` belongs to whoever makes it first, so that its
owner and mode are looked at, and those of each folder above it, as OpenSSH does with keys.
"""

from __future__ import annotations

import contextlib
import grp
import os
import pwd
import stat
from pathlib import Path

from hvdtrain.horovod_build.failure import BuildError

_ROOT = 0


def make_private(folder: Path) -> None:
    """Make a folder for this user alone where there is none, and see that nobody else can write in it.

    Raises:
        BuildError: Somebody else can, or it cannot be made; says who, and what to do.
    """
    check_private(folder)
    try:
        missing = [each for each in (folder, *folder.parents) if not each.exists()]
        for each in reversed(missing):
            with contextlib.suppress(FileExistsError):  # of another build, or of somebody else: it is looked at below
                each.mkdir(mode=0o700)
        if not folder.is_dir():
            raise NotADirectoryError(20, "Not a directory")
    except OSError as error:
        raise BuildError(
            f"{folder} cannot be written ({error.strerror}); name another folder by HVDTRAIN_CACHE or --wheel-dir"
        ) from error
    check_private(folder)


def check_private(path: Path) -> None:
    """Refuse a file or folder, if it is there, that somebody else could have written, or put in its place.

    Raises:
        BuildError: Says which folder, whose it is, and what to do.
    """
    lexical = Path(os.path.abspath(path))
    places = [lexical, *lexical.parents]
    with contextlib.suppress(OSError, RuntimeError):
        resolved = lexical.resolve()
        places += [each for each in (resolved, *resolved.parents) if each not in places]
    for place in places:
        problem = _problem(place, itself=place in (places[0], lexical.resolve()))
        if problem:
            raise BuildError(
                f"{path} is not used for finished wheels, which are code: {problem}. Name a folder of your own by "
                "HVDTRAIN_CACHE or --wheel-dir, or make this one private: remove what is in it, then chmod 700"
            )


def _problem(place: Path, *, itself: bool) -> str:
    """Who else can write here; "" for nobody, or where nothing is."""
    try:
        found = place.lstat()
    except OSError:
        return ""
    mode = stat.S_IMODE(found.st_mode)
    shared_by_design = (
        mode & stat.S_ISVTX and not itself
    )  # as /tmp: others may write, but not rename or remove what is there
    if found.st_uid not in {_ROOT, os.getuid()} | (set() if itself else _unmapped()):
        return f"{place} belongs to {_user(found.st_uid)}"
    if stat.S_ISLNK(found.st_mode) or shared_by_design:  # a link's mode means nothing; whose it is was asked
        return ""
    if mode & stat.S_IWOTH:
        return f"{place} can be written by everybody (mode {mode:o})"
    shared = mode & stat.S_IWGRP and not _is_private_group(found.st_gid)
    return f"{place} can be written by the group {_group(found.st_gid)} (mode {mode:o})" if shared else ""


def _is_private_group(gid: int) -> bool:
    """Whether a group holds this user alone, as many systems give to each (and then make folders of mode 775)."""
    if gid == _ROOT:
        return True
    try:
        me, group = pwd.getpwuid(os.getuid()), grp.getgrgid(gid)
    except KeyError:
        return False
    return group.gr_gid == me.pw_gid and group.gr_name == me.pw_name and set(group.gr_mem) <= {me.pw_name}


def _unmapped() -> set[int]:
    """What the owners of a bind mount outside this container look like, root among them."""
    try:
        mapped = Path("/proc/self/uid_map").read_text().split()
        whole = mapped[:3] == ["0", "0", "4294967295"]
        return set() if whole else {int(Path("/proc/sys/kernel/overflowuid").read_text())}
    except (OSError, ValueError):
        return set()


def _user(uid: int) -> str:
    try:
        return f"{pwd.getpwuid(uid).pw_name} (user id {uid})"
    except KeyError:
        return f"user id {uid}"


def _group(gid: int) -> str:
    try:
        return f"{grp.getgrgid(gid).gr_name} (group id {gid})"
    except KeyError:
        return f"of id {gid}"
