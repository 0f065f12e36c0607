"""What a build with NCCL needs beside a compiler."""

from __future__ import annotations

import os
import shutil

import pytest

from hvdtrain.horovod_build.failure import BuildError
from hvdtrain.horovod_build.nvidia import _complete, fetch_toolkit, links_to_nccl, torch_architectures
from hvdtrain.horovod_build.probe import Cuda, Nccl, find_cuda
from hvdtrain.horovod_build.running import Log


@pytest.fixture
def log(tmp_path):
    log = Log(tmp_path / "log")
    yield log
    log.close()


def test_nccl_gets_the_names_that_a_linker_looks_for(tmp_path):
    (tmp_path / "nccl.h").write_text("header")
    (tmp_path / "libnccl.so.2").write_text("library")
    nccl = Nccl(header=str(tmp_path / "nccl.h"), library=str(tmp_path / "libnccl.so.2"), version="2")
    folder = links_to_nccl(nccl, tmp_path / "links")
    assert (folder / "include" / "nccl.h").read_text() == "header"
    assert (folder / "lib" / "libnccl.so").read_text() == "library"


def test_a_toolkit_of_wheels_is_completed_by_links(tmp_path):
    (tmp_path / "lib").mkdir()
    for name in ("libcudart.so.13", "libnvvm.so.4.0.0", "libcudart_static.a"):
        (tmp_path / "lib" / name).write_text(name)
    _complete(tmp_path)
    assert (tmp_path / "lib64" / "libcudart.so").read_text() == "libcudart.so.13"
    assert (tmp_path / "lib64" / "libnvvm.so").read_text() == "libnvvm.so.4.0.0"
    assert sorted(file.name for file in (tmp_path / "lib").glob("libcudart*")) == [
        "libcudart.so", "libcudart.so.13", "libcudart_static.a",
    ]  # fmt: skip


def test_a_toolkit_that_is_in_the_cache_is_not_fetched_again(tmp_path, log):
    nvcc = tmp_path / "cuda-13.0" / "nvidia" / "cu13" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("")
    found = fetch_toolkit("13.0", {"HVDTRAIN_CACHE": str(tmp_path), "PATH": ""}, log=log)
    assert found == Cuda(home=str(nvcc.parents[1]), version="13.0")


def test_a_toolkit_that_cannot_be_fetched_leaves_nothing_behind(tmp_path, log):
    cache = tmp_path / "cache"
    offline = {
        "HVDTRAIN_CACHE": str(cache),
        "PIP_NO_INDEX": "1",
        "PIP_CONFIG_FILE": os.devnull,
        "PATH": os.environ["PATH"],
    }
    with pytest.raises(
        BuildError, match=r"(?s)NVIDIA's compiler for CUDA 13\.0 could not be fetched.*CUDA_HOME.*Log: "
    ):
        fetch_toolkit("13.0", offline, log=log)
    assert list(cache.iterdir()) == []


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc on PATH")
def test_the_architectures_are_those_of_torch_that_nvcc_knows(tmp_path, log):
    import torch

    cuda = find_cuda(os.environ)
    assert isinstance(cuda, Cuda)
    if torch.version.cuda is None:
        with pytest.raises(BuildError, match="choose by --cuda-arch"):
            torch_architectures(cuda, os.environ, log=log, folder=tmp_path)
        return
    found = torch_architectures(cuda, os.environ, log=log, folder=tmp_path)
    assert list(found) == sorted(found, key=float)
    assert {f"sm_{arch.replace('.', '')}" for arch in found} <= set(torch._C._cuda_getArchFlags().split())
