"""Python, torch, torchvision and Horovod: there, loadable, and of versions that fit each other."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator
from importlib.util import find_spec

from hvdtrain.backends.hvd import stamp
from hvdtrain.doctor.asking import ask_python
from hvdtrain.doctor.rows import Row, Section
from hvdtrain.version import __version__

_SECTION = Section("software")
_TORCH = """
import torch
import torch.distributed as dist
gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
tell(version=torch.__version__, cuda=torch.version.cuda or torch.version.hip, gpus=gpus, distributed=dist.is_available(),
     gloo=dist.is_available() and dist.is_gloo_available(), nccl=dist.is_available() and dist.is_nccl_available(),
     path=torch.__file__)
"""
_TORCHVISION = "import torchvision, torchvision.ops; tell(version=torchvision.__version__)"
_HOROVOD = "import horovod, horovod.torch as hvd; tell(version=horovod.__version__)"


def rows() -> Iterator[Row]:
    """What is installed."""
    yield _SECTION.ok("hvdtrain", __version__)
    yield _SECTION.ok("Python", f"{platform.python_version()}, {sys.prefix}")
    yield from _torch()
    yield from _torchvision()
    yield from _horovod()


def _torch() -> Iterator[Row]:
    if find_spec("torch") is None:
        yield _SECTION.wrong("torch", "not installed", "pip install torch")
        return
    answer = ask_python(_TORCH)
    if not answer.facts:
        remedy = "import torch fails in this environment: look at LD_LIBRARY_PATH and PYTHONPATH, then reinstall torch"
        yield _SECTION.wrong("torch", f"cannot be imported: {answer.how}", remedy)
        return
    facts = answer.facts[0]
    build = f"CUDA {facts['cuda']}" if facts["cuda"] else "CPU build"
    carriers = [name for name, key in (("Gloo", "gloo"), ("NCCL", "nccl")) if facts[key]]
    yield _SECTION.ok("torch", f"{facts['version']}, {build}, {' and '.join(carriers) or 'no process groups'}")
    if not facts["gloo"]:
        yield _SECTION.wrong("torch", "built without Gloo", "backend torch needs it on CPUs: install torch from PyPI")


def _torchvision() -> Iterator[Row]:
    if find_spec("torchvision") is None:
        yield _SECTION.note("torchvision", "not installed: no ResNets, no CIFAR", "pip install 'hvdtrain[vision]'")
        return
    answer = ask_python(_TORCHVISION)
    if answer.facts:
        yield _SECTION.ok("torchvision", answer.facts[0]["version"])
        return
    yield _SECTION.wrong(
        "torchvision",
        f"cannot be imported: {answer.how}",
        "it belongs to another torch: install both at once, pip install torch torchvision",
    )


def _horovod() -> Iterator[Row]:
    found, reason = stamp.installed(), stamp.why_not()
    if found is None:
        yield _SECTION.note("Horovod", "not installed: no backend horovod, no horovodrun", stamp.COMMAND)
        return
    built = found.stamp
    said = f"{built.horovod} for torch {built.torch}" if built else f"in {found.folder}, not built by hvdtrain"
    if reason:
        yield _SECTION.wrong("Horovod", said, reason)
        return
    answer = ask_python(_HOROVOD)
    if not answer.facts:
        yield _SECTION.wrong("Horovod", f"cannot be imported: {answer.how}", f"build it anew: {stamp.COMMAND} --force")
        return
    if built is None:
        yield _SECTION.note(
            "Horovod", f"{answer.facts[0]['version']}, {said}", "horovodrun --check-build says what it has"
        )
        return
    features = [stamp.short_library(built.mpi)] if built.mpi else []
    features += ["Gloo"] if built.gloo else []
    features += [f"NCCL {built.nccl}"] if built.nccl else []
    yield _SECTION.ok("Horovod", f"{said}, with {', '.join(features)}")
