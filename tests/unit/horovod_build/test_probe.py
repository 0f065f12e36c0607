"""What is on the machine is found where it is, and what is not is said: on this machine's real tools."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from pathlib import Path

import pytest

from hvdtrain.horovod_build import probe
from hvdtrain.horovod_build.probe import Compiler, Cuda, Mpi, Nccl, Tool

needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
needs_mpi = pytest.mark.skipif(not isinstance(probe.find_mpi(os.environ), Mpi), reason="needs an MPI to build with")
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc on PATH")


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)
    return path


def without(environment, *names):
    return {name: value for name, value in environment.items() if name not in names}


@needs_compiler
def test_the_compiler_is_found_and_compiles():
    found = probe.find_compiler(without(os.environ, "CXX"), (17,))
    assert isinstance(found, Compiler)
    assert os.access(found.path, os.X_OK)
    assert found.cxx_standard == 17


def test_no_compiler_is_said_and_what_was_looked_for(tmp_path):
    assert probe.find_compiler({"PATH": str(tmp_path)}) == "none of c++, g++, clang++ is on PATH"
    assert probe.find_compiler({"PATH": str(tmp_path), "CXX": "mycc -O1"}) == "none of mycc is on PATH"


def test_a_compiler_that_compiles_nothing_is_said_with_its_reason(tmp_path):
    script(tmp_path / "c++", "case $1 in --version) echo 'c++ 4.8';; *) echo 'no such standard' >&2; exit 1;; esac")
    said = probe.find_compiler({"PATH": f"{tmp_path}:/usr/bin:/bin"}, (20, 17))
    assert said == "c++ (c++ 4.8) compiles no C++17: no such standard"


@needs_compiler
def test_the_compiler_of_cxx_is_taken_with_its_arguments(tmp_path):
    wrapper = script(tmp_path / "wrapper", 'exec "$@"')
    found = probe.find_compiler({**os.environ, "CXX": f"{wrapper} {shutil.which('c++')} -O0"}, (17,))
    assert isinstance(found, Compiler)
    assert found.path == str(wrapper)


@needs_compiler
def test_an_older_compiler_gets_the_older_standard_that_will_do(tmp_path):
    script(tmp_path / "c++", f'case "$*" in *c++20*) exit 1;; esac; exec {shutil.which("c++")} "$@"')
    found = probe.find_compiler({"PATH": f"{tmp_path}:{os.environ['PATH']}"}, (20, 17))
    assert isinstance(found, Compiler)
    assert found.cxx_standard == 17


@needs_mpi
def test_the_environments_own_mpi_goes_first():
    own = Path(sysconfig.get_path("scripts")) / "mpicxx"
    if not own.exists():
        pytest.skip("no MPI in this Python environment")
    found = probe.find_mpi(without(os.environ, "MPICXX"))
    assert isinstance(found, Mpi)
    assert found.mpicxx == str(own)


@needs_mpi
def test_an_mpi_says_its_version_and_the_library_that_programs_load():
    found = probe.find_mpi(os.environ)
    assert isinstance(found, Mpi)
    assert any(name in found.library for name in ("Open MPI", "MPICH", "Intel"))
    assert ".so" in Path(found.libmpi).name
    assert Path(found.libmpi).is_file()
    assert found.mpirun is None or os.access(found.mpirun, os.X_OK)


def test_a_wrapper_without_its_library_means_a_missing_development_package(tmp_path):
    wrapper = script(tmp_path / "bin" / "mpicxx", f"echo c++ -L{tmp_path} -lmpich")
    said = probe.find_mpi({"PATH": "/usr/bin:/bin", "MPICXX": str(wrapper)})
    assert said == f"{wrapper} is there, but its libmpich.so is not: the development package of that MPI is missing"


def test_a_wrapper_that_does_not_exist_is_named():
    assert probe.find_mpi({"PATH": "/usr/bin", "MPICXX": "/no/mpicxx"}) == "/no/mpicxx ($MPICXX) does not exist"


def test_a_library_that_cannot_be_loaded_is_no_mpi(tmp_path):
    wrapper = script(tmp_path / "bin" / "mpicxx", f"echo c++ -L{tmp_path}/lib -lmpi")
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libmpi.so").write_bytes(b"\x7fELF" + b"\0" * 8000)
    said = probe.find_mpi({"PATH": os.environ["PATH"], "MPICXX": str(wrapper)})
    assert said == f"{tmp_path}/lib/libmpi.so of {wrapper} cannot be loaded"


def test_a_wrapper_that_fails_is_quoted(tmp_path):
    wrapper = script(tmp_path / "mpicxx", "echo its reason >&2; exit 1")
    said = probe.find_mpi({"PATH": os.environ["PATH"], "MPICXX": str(wrapper)})
    assert said == f"{wrapper} -show fails: its reason"


@needs_mpi
def test_a_broken_mpi_is_passed_over_for_one_that_works(tmp_path):
    script(tmp_path / "mpic++", "exit 1")
    working = probe.find_mpi(os.environ)
    assert probe.find_mpi({**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}) == working


def test_programs_of_one_mpi_are_found_by_their_common_suffix(tmp_path):
    for name in ("mpicxx.mpich", "mpirun.mpich", "mpirun"):
        script(tmp_path / name, "")
    assert probe._sibling(str(tmp_path / "mpicxx.mpich"), {"mpicxx": "mpirun"}) == str(tmp_path / "mpirun.mpich")
    assert probe._sibling(str(tmp_path / "mpicxx.mpich"), {"mpicxx": "mpicc"}) is None


def test_a_linker_script_leads_to_the_library_it_names(tmp_path):
    (tmp_path / "libmpi.so.40").write_bytes(b"\0" * 5000)
    (tmp_path / "libmpi.so").write_text("INPUT(libmpi.so.40)\n")
    assert probe._loaded(tmp_path / "libmpi.so") == tmp_path / "libmpi.so.40"


def test_a_link_leads_to_the_name_that_programs_load(tmp_path):
    (tmp_path / "libmpi.so.40.30.4").write_bytes(b"\0" * 5000)
    (tmp_path / "libmpi.so.40").symlink_to("libmpi.so.40.30.4")
    (tmp_path / "libmpi.so").symlink_to("libmpi.so.40.30.4")
    assert probe._loaded(tmp_path / "libmpi.so") == tmp_path / "libmpi.so.40"


def test_torch_is_read_without_importing_it():
    import torch

    found = probe.find_torch()
    assert found is not None
    assert found.version == torch.__version__
    assert found.cuda == torch.version.cuda
    assert found.folder == Path(torch.__file__).parent


@pytest.mark.parametrize(
    ("builder", "headers", "expected"),
    [
        ("cflags = ['-std=c++17']", "#if __cplusplus < 201703L", (17,)),
        ("cflags = ['-std=c++20', \"-std=c++20\"]", "#if __cplusplus < 201703L", (20, 17)),
        ("cflags = ['-std=c++20']", "(!defined(_MSVC_LANG) && __cplusplus < 202002L)", (20,)),
        ("", "__cplusplus < 202302L", (23,)),
        ("", "", (17,)),
    ],
)
def test_the_standards_are_those_of_torchs_builder_and_of_its_headers(tmp_path, builder, headers, expected):
    for name, text in (("utils/cpp_extension.py", builder), ("include/ATen/ATen.h", headers)):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(text)
    assert probe._cxx_standards(tmp_path) == expected


@needs_nvcc
def test_a_script_on_path_leads_to_the_toolkit_that_it_starts(tmp_path):
    real = probe.find_cuda(without(os.environ, "CUDA_HOME", "CUDA_PATH"))
    assert isinstance(real, Cuda)
    script(tmp_path / "nvcc", f'exec {real.home}/bin/nvcc "$@"')
    assert probe.find_cuda({"PATH": f"{tmp_path}:/usr/bin:/bin"}) == real


@needs_nvcc
def test_cuda_home_goes_before_path(tmp_path):
    script(tmp_path / "other" / "bin" / "nvcc", "echo release 99.9, V99.9.1")
    found = probe.find_cuda({**os.environ, "CUDA_HOME": str(tmp_path / "other")})
    assert found == Cuda(home=str(tmp_path / "other"), version="99.9")


def test_a_toolkit_that_is_not_there_is_said(tmp_path):
    if os.path.exists("/usr/local/cuda/bin/nvcc"):
        pytest.skip("/usr/local/cuda is there")
    assert probe.find_cuda({"PATH": str(tmp_path)}) == "no nvcc in CUDA_HOME, on PATH or in /usr/local/cuda"


def test_nccl_is_read_from_its_header(tmp_path):
    (tmp_path / "include").mkdir()
    (tmp_path / "lib").mkdir()
    (tmp_path / "include" / "nccl.h").write_text("#define NCCL_MAJOR 2\n#define NCCL_MINOR  29\n#define NCCL_PATCH 7\n")
    library = tmp_path / "lib" / "libnccl.so.2"
    library.write_text("")
    assert probe.find_nccl({"NCCL_HOME": str(tmp_path)}) == Nccl(
        header=str(tmp_path / "include" / "nccl.h"), library=str(library), version="2.29.7"
    )


def test_nccl_needs_header_and_library(tmp_path):
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "nccl.h").write_text("#define NCCL_MAJOR 2\n")
    found = probe.find_nccl({"NCCL_HOME": str(tmp_path)})
    assert isinstance(found, str) or not found.header.startswith(str(tmp_path))


def test_gpus_are_those_that_the_driver_lists(tmp_path):
    script(tmp_path / "nvidia-smi", "echo 9.0; echo 8.0; echo 9.0; echo 10.0")
    assert probe.find_gpus({"PATH": f"{tmp_path}:/bin"}) == ("8.0", "9.0", "10.0")
    script(tmp_path / "nvidia-smi", "echo 'NVIDIA-SMI has failed'; exit 9")
    assert probe.find_gpus({"PATH": f"{tmp_path}:/bin"}) == ()
    assert probe.find_gpus({"PATH": str(tmp_path / "none")}) == ()


def test_a_program_that_never_answers_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(probe, "_ANSWERS_S", 0.5)
    script(tmp_path / "cmake", "exec sleep 60")
    assert probe._tool("cmake", {"PATH": f"{tmp_path}:/bin:/usr/bin"}) is None


@pytest.mark.parametrize(
    ("line", "number"),
    [("cmake version 3.25.1", (3, 25, 1)), ("cmake version 4.0.0-rc2", (4, 0, 0)), ("GNU Make 4.3", (4, 3)), ("x", ())],
)
def test_versions_are_read_as_numbers(line, number):
    assert Tool(path="x", version=line).number == number


def test_pythons_headers_are_here_or_said_to_be_missing():
    folder = probe.find_python_headers()
    assert folder is None or (folder / "Python.h").is_file()


def test_looking_at_the_machine_loads_no_torch():
    import subprocess

    code = "import sys; from hvdtrain.horovod_build.probe import machine; machine(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0
