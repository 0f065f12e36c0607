"""What a build with NCCL needs besides a compiler: NVIDIA's toolkit from PyPI, NCCL with linkable names, architectures."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from hvdtrain.horovod_build import wheels
from hvdtrain.horovod_build.failure import BuildError
from hvdtrain.horovod_build.private_folder import check_private, make_private
from hvdtrain.horovod_build.probe import Cuda, Nccl
from hvdtrain.horovod_build.running import Log, pip, run

_PARTS = ("nvidia-cuda-nvcc", "nvidia-cuda-crt", "nvidia-nvvm", "nvidia-cuda-runtime", "nvidia-cuda-cccl")
_FETCH_S = 1800.0
_ANSWER_S = 120.0


def fetch_toolkit(version: str, environment: Mapping[str, str], *, log: Log) -> Cuda:
    """NVIDIA's compiler from its wheels on PyPI, kept in the cache (about 400 MB); there from CUDA 13 on.

    Args:
        version: As in "13.0".
        environment: For pip, and for where the cache is.
        log: Takes pip's output.

    Raises:
        BuildError: It could not be fetched.
    """
    place = wheels.cache(environment) / f"cuda-{version}"
    make_private(place.parent)
    home = place / "nvidia" / f"cu{version.partition('.')[0]}"
    check_private(home / "bin" / "nvcc")
    if (home / "bin" / "nvcc").is_file():
        return Cuda(home=str(home), version=version)
    beside = place.with_name(f".{place.name}.{os.getpid()}")
    try:
        beside.mkdir(parents=True)
        wanted = [f"{part}=={version}.*" for part in _PARTS]
        command = [*pip(), "install", "--target", str(beside), "--no-deps", *wanted]
        code, lines = run(command, log=log, environment=environment, folder=beside, limit_s=_FETCH_S)
        made = beside / "nvidia" / home.name
        if code or not (made / "bin" / "nvcc").is_file():
            said = next((line for line in lines if "ERROR" in line), "no nvcc in what was fetched")
            raise BuildError(
                f"NVIDIA's compiler for CUDA {version} could not be fetched from PyPI: {said.strip()}\n"
                f"Install the CUDA toolkit and name it by the variable CUDA_HOME. Log: {log.path}"
            )
        _complete(made)
        shutil.rmtree(place, ignore_errors=True)
        os.replace(beside, place)
    except OSError as error:
        raise BuildError(
            f"{place} cannot be written ({error.strerror}); set HVDTRAIN_CACHE to another folder"
        ) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return Cuda(home=str(home), version=version)


def links_to_nccl(nccl: Nccl, into: Path) -> Path:
    """A folder with ``include/nccl.h`` and ``lib/libnccl.so``; NVIDIA's wheel has the library as libnccl.so.2 only."""
    (into / "include").mkdir(parents=True)
    (into / "lib").mkdir()
    for header in Path(nccl.header).parent.glob("nccl*.h"):
        (into / "include" / header.name).symlink_to(header)
    (into / "lib" / "libnccl.so").symlink_to(nccl.library)
    return into


def torch_architectures(cuda: Cuda, environment: Mapping[str, str], *, log: Log, folder: Path) -> tuple[str, ...]:
    """The compute capabilities that torch holds code for and this nvcc knows.

    Raises:
        BuildError: There are none.
    """
    asked = ["-c", "import torch; print('torch:', torch._C._cuda_getArchFlags())"]
    _, said = run([sys.executable, *asked], log=log, environment=environment, folder=folder, limit_s=_ANSWER_S)
    nvcc = [f"{cuda.home}/bin/nvcc", "--list-gpu-code"]
    _, known = run(nvcc, log=log, environment=environment, folder=folder, limit_s=_ANSWER_S)
    flags = next((line for line in said if line.startswith("torch:")), "")
    both = {number for number in re.findall(r"sm_(\d+)\b", flags) if f"sm_{number}" in {line.strip() for line in known}}
    if not both:
        raise BuildError(
            f"torch's architectures ({flags or 'none'}) are unknown to {nvcc[0]}; choose by --cuda-arch 8.0,9.0"
        )
    return tuple(f"{number[:-1]}.{number[-1]}" for number in sorted(both, key=int))


def _complete(home: Path) -> None:
    """What the wheels lack of a toolkit: a lib64, and names without versions to link with."""
    libraries = home / "lib"
    if not (home / "lib64").exists():
        (home / "lib64").symlink_to("lib")
    for library in libraries.glob("*.so.*"):
        plain = libraries / (library.name.partition(".so.")[0] + ".so")
        if not plain.exists():
            plain.symlink_to(library.name)
