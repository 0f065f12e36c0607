"""What can be asked of the builder: the flags of ``hvdtrain install-horovod``, as a dataclass."""

from __future__ import annotations

import re
from dataclasses import dataclass

from hvdtrain.errors import ConfigError
from hvdtrain.settings.options import option, settle

HOROVOD = "0.28.1"
"""The newest release of Horovod, the one the edits are made for."""
HOROVOD_SHA256 = "92a43f5a94c43907a56805bad15f19700c62ffc83b7ca483f9e104e229f67ef0"
"""Of its sdist on PyPI, ``horovod-0.28.1.tar.gz``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Wishes:
    """The options of one installation; see ``hvdtrain install-horovod --help``."""

    mpi: bool | None = option(
        None, "build with MPI, or without", group="what to build", default_text="with, if an MPI is found"
    )
    gloo: bool = option(True, "build with Gloo, or without", group="what to build")
    nccl: str = option(
        "auto",
        "build with NCCL for CUDA GPUs: auto does if torch is a CUDA build and a fitting nvcc is found; "
        "on fetches NVIDIA's compiler from PyPI where there is none",
        group="what to build",
        choices=("auto", "on", "off"),
    )
    cuda_arch: str | None = option(
        None,
        "compute capabilities to compile for, such as 8.0,9.0",
        group="what to build",
        metavar="LIST",
        default_text="those of the GPUs here, else those of torch",
    )
    source: str | None = option(
        None,
        "build this instead: an sdist, a folder, or git+URL[@REVISION]",
        group="what to build",
        metavar="WHERE",
        default_text=f"Horovod {HOROVOD} from PyPI",
    )
    jobs: int | None = option(
        None,
        "compile so many files at once",
        group="how",
        metavar="N",
        at_least=1,
        default_text="one for each CPU, fewer if memory is short",
    )
    wheel_dir: str | None = option(
        None,
        "keep finished wheels here, and look here for them",
        group="how",
        metavar="DIR",
        default_text="the user's cache, ~/.cache/hvdtrain/wheels",
    )
    force: bool = option(False, "build anew even if the wheel is there or Horovod is installed", group="how")
    verify: bool = option(True, "end with an all-reduce over two ranks", group="how")
    dry_run: bool = option(False, "show what would be done, and end", group="how")
    check: bool = option(False, "show what is installed and what it was built for, and end", group="how")

    def __post_init__(self) -> None:
        settle(self)
        if self.mpi is False and not self.gloo:
            raise ConfigError("--no-mpi with --no-gloo leaves Horovod nothing to talk over; keep one of them")
        for capability in self.capabilities:
            if not re.fullmatch(r"\d{1,2}\.\d", capability):
                raise ConfigError(f"--cuda-arch {self.cuda_arch!r}: write compute capabilities as in 8.0,9.0")
        if self.capabilities and self.nccl == "off":
            raise ConfigError("--cuda-arch says what to compile for GPUs, and --nccl off compiles nothing for them")

    @property
    def capabilities(self) -> tuple[str, ...]:
        """The compute capabilities asked for ("9.0"), in ascending order; () to choose."""
        if self.cuda_arch is None:
            return ()
        return tuple(sorted({part.strip() for part in self.cuda_arch.split(",") if part.strip()}, key=_number))


def _number(capability: str) -> float:
    try:
        return float(capability)
    except ValueError:
        return 0.0
