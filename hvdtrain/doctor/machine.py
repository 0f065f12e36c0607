"""This machine as its ranks meet it: CPUs, memory, GPUs, shared memory, limits, its name, its temporary folder."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from hvdtrain.doctor.asking import ask, ask_python
from hvdtrain.doctor.rows import Row, Section

_SECTION = Section("machine")
_MB, _GB = 2**20, 2**30
_SHARED_WRONG, _SHARED_LOW = 32 * _MB, 512 * _MB
_FILES_WRONG, _FILES_LOW = 256, 1024
_TEMPORARY_WRONG = 64 * _MB
_CGROUP = Path("/sys/fs/cgroup")
_CUDA = "import torch; tell(there=torch.cuda.is_available(), built=torch.version.cuda, count=torch.cuda.device_count())"


def rows() -> Iterator[Row]:
    """All of it."""
    yield _cpus()
    yield _memory()
    yield from _gpus()
    yield _shared_memory()
    yield from _limits()
    yield _name()
    yield _temporary()


def _cpus() -> Row:
    there, allowed = os.cpu_count() or 1, len(os.sched_getaffinity(0))
    quota = _quota()
    usable = min(allowed, quota or allowed)
    said = f"{there}, of which this process may use {usable:g}"
    if usable < 2 <= there:
        return _SECTION.wrong(
            "CPUs",
            f"{said} (affinity {allowed}{f', cgroup quota {quota:g}' if quota else ''})",
            "an engine's thread and the training would share one core: mpirun --bind-to none, srun --cpus-per-task=2 or more, or a "
            "larger limit of the container",
        )
    return _SECTION.ok("CPUs", said)


def _quota() -> float | None:
    """CPUs that the control group allows; None without a limit."""
    try:
        quota, period = (_CGROUP / "cpu.max").read_text().split()
    except (OSError, ValueError):
        return None
    return None if quota == "max" else int(quota) / int(period)


def _memory() -> Row:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):  # "max" is no number
        total = min(total, int((_CGROUP / "memory.max").read_text()))
    return _SECTION.ok("memory", f"{total / _GB:.1f} GiB")


def _gpus() -> Iterator[Row]:
    smi = shutil.which("nvidia-smi")
    listed = (
        ask([smi, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"], limit_s=30) if smi else None
    )
    if listed is None or (listed.code == 0 and not listed.lines):
        yield _SECTION.ok("GPUs", "none")
        return
    if listed.code:
        remedy = "the NVIDIA driver does not answer: nvidia-smi; in a container, start it with --gpus all"
        yield _SECTION.wrong("GPUs", f"nvidia-smi: {listed.how}", remedy)
        return
    if any(line.count(",") < 2 for line in listed.lines):
        remedy = "it lists no GPUs as it should: look at what nvidia-smi says, and at which one is first on PATH"
        yield _SECTION.wrong("GPUs", f"{smi}: {listed.lines[0][:80]}", remedy)
        return
    for number, line in enumerate(listed.lines):
        yield _SECTION.ok(f"GPU {number}", line)
    facts = next(iter(ask_python(_CUDA).facts), None)
    if facts and not facts["there"]:
        why = "is a CPU build" if not facts["built"] else f"for CUDA {facts['built']} cannot use them"
        remedy = (
            "pip install a torch for CUDA" if not facts["built"] else "a newer driver, or a torch for an older CUDA"
        )
        yield _SECTION.wrong("GPUs in torch", f"torch {why}", remedy)
    if len(listed.lines) > 1:
        topology = ask([str(smi), "topo", "-m"], limit_s=30)
        links = sorted(
            {word for line in topology.lines for word in line.split() if word.startswith("NV") and word[2:].isdigit()}
        )
        yield _SECTION.note("between GPUs", ", ".join(links) if links else "no NVLink: through PCI Express")


def _shared_memory() -> Row:
    try:
        found = os.statvfs("/dev/shm")
    except OSError as error:
        return _SECTION.wrong("/dev/shm", error.strerror, "loader workers and MPI need it: mount a tmpfs there")
    size, free = found.f_frsize * found.f_blocks, found.f_frsize * found.f_bavail
    said = f"{free / _MB:.0f} of {size / _MB:.0f} MiB free"
    remedy = "loader workers and MPI keep batches and messages there: docker run --shm-size=8g, or --ipc=host; remove leftovers"
    if free < _SHARED_WRONG:
        return _SECTION.wrong("/dev/shm", said, remedy)
    return _SECTION.note("/dev/shm", said, remedy) if free < _SHARED_LOW else _SECTION.ok("/dev/shm", said)


def _limits() -> Iterator[Row]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    said = f"{_bound(soft)} (ulimit -n), at most {_bound(hard)}"
    remedy = f"ulimit -n {_bound(hard)}: each rank needs descriptors for its peers, its data and its workers"
    if soft != resource.RLIM_INFINITY and soft < _FILES_WRONG:
        yield _SECTION.wrong("open files", said, remedy)
    elif soft != resource.RLIM_INFINITY and soft < _FILES_LOW:
        yield _SECTION.note("open files", said, remedy)
    else:
        yield _SECTION.ok("open files", said)
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    said = f"{_bound(locked)} (ulimit -l)"
    if Path("/sys/class/infiniband").exists() and locked != resource.RLIM_INFINITY:
        remedy = "InfiniBand needs it unlimited: ulimit -l unlimited, docker run --ulimit memlock=-1"
        yield _SECTION.wrong("locked memory", said, remedy)
    else:
        yield _SECTION.ok("locked memory", said)


def _bound(limit: int) -> str:
    return "unlimited" if limit == resource.RLIM_INFINITY else str(limit)


def _name() -> Row:
    name = socket.gethostname()
    found: list[str] = []

    def look() -> None:
        try:
            found.append(socket.gethostbyname(name))
        except OSError as error:
            found.append(f"! {error.strerror or error}")

    looking = threading.Thread(target=look, daemon=True)  # a name server may not answer for minutes
    looking.start()
    looking.join(10)
    said = found[0] if found else "! no answer in 10 s"
    if said.startswith("!"):
        return _SECTION.wrong(
            "host name",
            f"{name}: {said[2:]}",
            f"ranks on other hosts look for this name: add it to /etc/hosts (127.0.0.1 {name})",
        )
    return _SECTION.ok("host name", f"{name}, {said}")


def _temporary() -> Row:
    remedy = "ranks meet through files and sockets there: TMPDIR=/a/folder/on/this/host"
    try:
        folder = tempfile.gettempdir()
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x" * 4096)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return _SECTION.wrong("temporary", f"cannot be written to: {error.strerror or error}", remedy)
    said = f"{folder}, {free / _MB:.0f} MiB free"
    if len(folder) > 80:
        return _SECTION.wrong("temporary", f"{said}; its name is too long for sockets", remedy)
    return _SECTION.wrong("temporary", said, remedy) if free < _TEMPORARY_WRONG else _SECTION.ok("temporary", said)
