"""Other hosts: whether ssh gets there without a question, and whether the same software is there at the same place."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence

from hvdtrain.doctor.asking import ask
from hvdtrain.doctor.rows import WRONG, Row, Section, parsed

_SECTION = Section("hosts")
_SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10")
_ALIKE = ("hvdtrain", "Python", "torch", "Horovod", "mpi4py")


def rows(hosts: Sequence[str], here: Sequence[Row]) -> Iterator[Row]:
    """Ask the doctor of each host.

    Args:
        hosts: Names, as for mpirun and horovodrun.
        here: What was found on this one.
    """
    if shutil.which("ssh") is None:
        yield _SECTION.wrong(
            "ssh", "not installed", "mpirun and horovodrun reach other hosts by it: apt install openssh-client"
        )
        return
    for host in hosts:
        if not host.strip() or host.startswith("-"):
            yield _SECTION.wrong(host or "(empty)", "no host name", "--hosts a,b")
            continue
        yield from _host(host.strip(), here)


def _host(host: str, here: Sequence[Row]) -> Iterator[Row]:
    answer = ask([*_SSH, host, "true"], limit_s=30)
    if answer.code:
        remedy = f"ssh {host} must work without a question: keys (ssh-copy-id {host}), and a host key that is known"
        yield _SECTION.wrong(host, f"ssh: {answer.how}", remedy)
        return
    command = shlex.join([sys.executable, "-m", "hvdtrain", "doctor", "--json", "--no-trials"])
    answer = ask([*_SSH, host, command], limit_s=180)
    said = "\n".join(answer.lines)
    try:
        there = parsed(said[said.index("[\n") :])
    except ValueError:
        remedy = f"the same environment must be at the same place on every host: {sys.executable} with hvdtrain"
        yield _SECTION.wrong(host, f"its doctor does not answer: {answer.how}", remedy)
        return
    different = [
        f"{what}: {_found(there, what)} there, {_found(here, what)} here"
        for what in _ALIKE
        if _found(there, what) != _found(here, what)
    ]
    if different:
        yield _SECTION.wrong(host, "; ".join(different), "install the same versions on every host")
    else:
        yield _SECTION.ok(host, "the same software as here")
    for row in there:
        if row.verdict == WRONG:
            yield _SECTION.wrong(f"{host}: {row.what}", row.found, row.remedy)


def _found(rows: Sequence[Row], what: str) -> str:
    return next((row.found for row in rows if row.what == what), "nothing")
