"""The edits that Horovod 0.28.1 needs to build and run on today's PyTorch, Python and Open MPI.

Each edit is a text that must occur an exact number of times, and what takes its place. A source in which it does not is
another Horovod than the one these edits were made for: that is an error, before anything is compiled. Nothing is edited
that the build could be told by a variable.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hvdtrain.horovod_build.failure import BuildError

CXX_STANDARD = "@CXX_STANDARD@"
"""Stands for the C++ standard that torch asks for, in the new texts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Edit:
    """One change to one file.

    Args:
        name: Of the edit, in messages and in the stamp.
        file: Path inside Horovod's source.
        why: The reason, for readers and for the documentation.
        old: The text that must be there.
        new: What replaces it.
        times: How often it must occur.
    """

    name: str
    file: str
    why: str
    old: str
    new: str
    times: int = 1


_ASK = (
    "execute_process(COMMAND ${PY_EXE} -c \"import os,sys; sys.stdout=sys.stderr=open(os.devnull,'w'); "
    "from torch.utils.cpp_extension import ${Pytorch_EXT} as ext; e = ext('', []); "
)

EDITS: tuple[Edit, ...] = (
    Edit(
        name="c++-standard",
        file="CMakeLists.txt",
        why="torch >= 2.1 needs C++17, later ones C++20",
        old="set(CMAKE_CXX_STANDARD 14)",
        new=f"set(CMAKE_CXX_STANDARD {CXX_STANDARD})",
    ),
    Edit(
        name="c++-standard-torch",
        file="horovod/torch/CMakeLists.txt",
        why="the same, for the extension",
        old="set(CMAKE_CXX_STANDARD 14)",
        new=f"set(CMAKE_CXX_STANDARD {CXX_STANDARD})",
    ),
    Edit(
        name="cuda-standard",
        file="horovod/common/ops/cuda/CMakeLists.txt",
        why="nvcc 13 knows no C++11",
        old="set(CMAKE_CUDA_STANDARD 11)",
        new="set(CMAKE_CUDA_STANDARD 17)",
    ),
    Edit(
        name="no-debug-information",
        file="setup.py",
        why="the same optimisation (-O3) without -g: a fifth of the size, and quicker to compile",
        old="'RelWithDebInfo'",
        new="'Release'",
    ),
    Edit(
        name="verbose-ninja",
        file="setup.py",
        why="VERBOSE=1 is a word of make's, and pip 23 asks for it; Ninja takes it for a target",
        old="        if self.verbose:\n            make_args",
        new="        if self.verbose and os.environ.get('CMAKE_GENERATOR') != 'Ninja':\n            make_args",
    ),
    Edit(
        name="narrow-headers",
        file="horovod/torch/adapter_v2.h",
        why="these two bring all of torch's C++ front end, and the file four times the compiler's work; tensors are enough",
        old="#include <torch/extension.h>\n#include <torch/torch.h>\n",
        new="#include <torch/types.h>\n",
    ),
    Edit(
        name="narrow-headers-module",
        file="horovod/torch/mpi_ops_v2.cc",
        why="the same where Python is met as well",
        old="#include <torch/extension.h>\n#include <torch/torch.h>\n",
        new="#include <torch/csrc/utils/pybind.h>\n#include <torch/types.h>\n",
    ),
    Edit(
        name="enqueue-unlocked",
        file="horovod/torch/mpi_ops_v2.cc",
        why="starting an operation may wait for Horovod's thread, which may wait for a rank that stands still: with Python's "
        "interpreter lock held, no other thread could notice",
        old="PYBIND11_MODULE(mpi_lib_v2, m) {\n",
        new="""namespace {
struct Unlocked {
  py::module_& module;
  template <typename Function> void def(const char* name, Function function) {
    module.def(name, function, py::call_guard<py::gil_scoped_release>());
  }
};
} // namespace

PYBIND11_MODULE(mpi_lib_v2, bare) {
  Unlocked m{bare};
""",
    ),
    Edit(
        name="wait-unlocked",
        file="horovod/torch/mpi_ops_v2.cc",
        why="the lock is released for the whole call by the edit before",
        old="      py::gil_scoped_release release_python_gil;\n",
        new="",
    ),
    Edit(
        name="joined-files",
        file="horovod/torch/CMakeLists.txt",
        why="six files in one go read the headers that they share once; the last six, torch's, are begun first",
        old='set_target_properties(${PYTORCH_TARGET_LIB} PROPERTIES PREFIX "")\n',
        new='set_target_properties(${PYTORCH_TARGET_LIB} PROPERTIES PREFIX "" UNITY_BUILD ON UNITY_BUILD_BATCH_SIZE 6)\n',
    ),
    Edit(
        name="joined-files-gloo",
        file="CMakeLists.txt",
        why="the same for Gloo, whose files are small; a name in allreduce.cc clashes with the others'",
        old="    target_compile_definitions(gloo PRIVATE _GLIBCXX_USE_CXX11_ABI=1)\n",
        new="    target_compile_definitions(gloo PRIVATE _GLIBCXX_USE_CXX11_ABI=1)\n"
        "    set_target_properties(gloo PROPERTIES UNITY_BUILD ON UNITY_BUILD_BATCH_SIZE 12)\n"
        '    set_source_files_properties("${PROJECT_SOURCE_DIR}/third_party/gloo/gloo/allreduce.cc"\n'
        "        TARGET_DIRECTORY gloo PROPERTIES SKIP_UNITY_BUILD_INCLUSION ON)\n",
    ),
    Edit(
        name="one-question",
        file="cmake/Modules/FindPytorch.cmake",
        why="each question loads torch for some seconds; folders and libraries are one",
        old="print(';'.join(e.include_dirs), file=sys.__stdout__)\"\n"
        "                OUTPUT_VARIABLE Pytorch_INCLUDE_DIRS OUTPUT_STRIP_TRAILING_WHITESPACE)\n"
        + _ASK
        + "print(';'.join(e.library_dirs), file=sys.__stdout__)\"\n"
        "                OUTPUT_VARIABLE Pytorch_LIBRARY_DIRS OUTPUT_STRIP_TRAILING_WHITESPACE)\n"
        + _ASK
        + "print(';'.join(e.libraries), file=sys.__stdout__)\"\n"
        "                OUTPUT_VARIABLE _Pytorch_LIBRARIES OUTPUT_STRIP_TRAILING_WHITESPACE)\n",
        new="print('|'.join(map(';'.join, (e.include_dirs, e.library_dirs, e.libraries))), file=sys.__stdout__)\"\n"
        "                OUTPUT_VARIABLE _Pytorch_FOUND OUTPUT_STRIP_TRAILING_WHITESPACE)\n"
        'if(NOT _Pytorch_FOUND MATCHES "^([^|]+)[|]([^|]+)[|]([^|]+)$")\n'
        '    message(FATAL_ERROR "torch does not name its headers and libraries: ${_Pytorch_FOUND}")\n'
        "endif()\n"
        'set(Pytorch_INCLUDE_DIRS "${CMAKE_MATCH_1}")\n'
        'set(Pytorch_LIBRARY_DIRS "${CMAKE_MATCH_2}")\n'
        'set(_Pytorch_LIBRARIES "${CMAKE_MATCH_3}")\n',
    ),
    Edit(
        name="one-gloo",
        file="CMakeLists.txt",
        why="Gloo is compiled for both C++ ABIs, of which one is used",
        old="    add_subdirectory(third_party/gloo)\n",
        new="    add_subdirectory(third_party/gloo EXCLUDE_FROM_ALL)\n",
    ),
    Edit(
        name="one-cuda-kernel",
        file="horovod/common/ops/cuda/CMakeLists.txt",
        why="the same for the CUDA kernels",
        old="horovod_cuda_kernels cuda_kernels.cu)",
        new="horovod_cuda_kernels EXCLUDE_FROM_ALL cuda_kernels.cu)",
        times=2,
    ),
    Edit(
        name="run-path",
        file="CMakeLists.txt",
        why="libraries are found beside the package, so that the wheel works in another environment too",
        old="project(horovod CXX)\n",
        new="project(horovod CXX)\n"
        "set(CMAKE_BUILD_WITH_INSTALL_RPATH ON)\n"
        'set(CMAKE_INSTALL_RPATH "$ENV{HVDTRAIN_RUN_PATH}")\n',
    ),
    Edit(
        name="chosen-mpi",
        file="CMakeLists.txt",
        why="the MPI that was found and reported is the one that is used",
        old="    find_package(MPI ${MPI_REQUIRED})\n",
        new='    set(MPI_C_COMPILER "$ENV{HVDTRAIN_MPICC}" CACHE FILEPATH "")\n'
        '    set(MPI_CXX_COMPILER "$ENV{HVDTRAIN_MPICXX}" CACHE FILEPATH "")\n'
        "    find_package(MPI ${MPI_REQUIRED})\n",
    ),
    Edit(
        name="cuda-only-if-wanted",
        file="CMakeLists.txt",
        why="a CUDA compiler on PATH must not turn a build without NCCL into one with CUDA",
        old="include(CheckLanguage)\ncheck_language(CUDA)\n",
        new="if(DEFINED ENV{HVDTRAIN_WITHOUT_CUDA})\n    set(CMAKE_CUDA_COMPILER OFF)\nelse()\n"
        "include(CheckLanguage)\ncheck_language(CUDA)\n",
    ),
    Edit(
        name="cuda-only-if-wanted-end",
        file="CMakeLists.txt",
        why="the end of that condition",
        old="    enable_language(CUDA)\nendif()\n",
        new="    enable_language(CUDA)\nendif()\nendif()\n",
    ),
    Edit(
        name="cuda-only-if-wanted-torch",
        file="cmake/Modules/FindPytorch.cmake",
        why="the same where torch is asked whether it is for NVIDIA's or AMD's GPUs",
        old='execute_process(COMMAND ${PY_EXE} -c "import torch; from torch.utils.cpp_extension import CUDA_HOME;',
        new="if(NOT DEFINED ENV{HVDTRAIN_WITHOUT_CUDA})\n"
        'execute_process(COMMAND ${PY_EXE} -c "import torch; from torch.utils.cpp_extension import CUDA_HOME;',
    ),
    Edit(
        name="cuda-only-if-wanted-torch-end",
        file="cmake/Modules/FindPytorch.cmake",
        why="the end of that condition",
        old='string(TOUPPER "${Pytorch_ROCM}" Pytorch_ROCM)\n',
        new='string(TOUPPER "${Pytorch_ROCM}" Pytorch_ROCM)\nendif()\n',
    ),
    Edit(
        name="c++-abi",
        file="cmake/Modules/FindPytorch.cmake",
        why="the function's public name",
        old="torch.torch.compiled_with_cxx11_abi()",
        new="torch.compiled_with_cxx11_abi()",
    ),
    Edit(
        name="python-headers",
        file="horovod/torch/CMakeLists.txt",
        why="Python 3.12 has no distutils",
        old="from distutils.sysconfig import get_python_inc; print(get_python_inc())",
        new="import sysconfig; print(sysconfig.get_path('include'))",
    ),
    Edit(
        name="jsrun-import",
        file="horovod/runner/js_run.py",
        why="Python 3.12 has no distutils, and horovodrun imports this file",
        old="from distutils.spawn import find_executable\n",
        new="from shutil import which as find_executable\n",
    ),
    Edit(
        name="ssh-host-keys",
        file="horovod/runner/util/remote.py",
        why="horovodrun went on where a host's key had changed; new hosts are taken as before",
        old="-o StrictHostKeyChecking=no'",
        new="-o StrictHostKeyChecking=accept-new'",
    ),
    Edit(
        name="gloo-environment-here",
        file="horovod/runner/gloo_run.py",
        why="horovodrun --gloo wrote the whole environment on the command lines of ranks, which inherit it on this host",
        old="        env_vars = create_slot_env_vars(slot_info)\n        horovod_rendez_env",
        new="        here = network.resolve_host_address(slot_info.hostname) in network.get_local_host_addresses()\n"
        "        env_vars = create_slot_env_vars(slot_info)\n        horovod_rendez_env",
    ),
    Edit(
        name="gloo-environment",
        file="horovod/runner/gloo_run.py",
        why="the same",
        old="                          if env_util.is_exportable(key)]),",
        new="                          if env_util.is_exportable(key) and not (here and os.environ.get(key) == value)]),",
    ),
    Edit(
        name="jsrun-flags",
        file="horovod/runner/js_run.py",
        why="the function returns three values: jsrun failed each time",
        old="    mpi_impl_flags, _ = _get_mpi_implementation_flags(",
        new="    mpi_impl_flags, _, _ = _get_mpi_implementation_flags(",
    ),
    Edit(
        name="mpirun-flags",
        file="horovod/runner/mpi_run.py",
        why="Open MPI 5 takes long options with two dashes only",
        old="_OMPI_FLAGS = ['-mca pml ob1', '-mca btl ^openib']",
        new="_OMPI_FLAGS = ['--mca pml ob1', '--mca btl ^openib']",
    ),
    Edit(
        name="mpirun-binding",
        file="horovod/runner/mpi_run.py",
        why="with one dash Open MPI 5 looks for a program called none",
        old="_NO_BINDING_ARGS = ['-bind-to none', '-map-by slot']",
        new="_NO_BINDING_ARGS = ['--bind-to none', '--map-by slot']",
    ),
    Edit(
        name="mpirun-ssh",
        file="horovod/runner/mpi_run.py",
        why="two dashes",
        old="f'-mca plm_rsh_args ",
        new="f'--mca plm_rsh_args ",
    ),
    Edit(
        name="mpirun-interfaces",
        file="horovod/runner/mpi_run.py",
        why="two dashes",
        old="'-mca btl_tcp_if_include {nics}'",
        new="'--mca btl_tcp_if_include {nics}'",
    ),
    Edit(
        name="mpirun-large",
        file="horovod/runner/mpi_run.py",
        why="two dashes",
        old="append('-mca plm_rsh_",
        new="append('--mca plm_rsh_",
        times=2,
    ),
    Edit(
        name="mpich-name",
        file="horovod/runner/mpi_run.py",
        why="MPICH's mpirun calls itself HYDRA",
        old="        elif 'MPICH' in output:\n",
        new="        elif 'MPICH' in output or 'HYDRA' in output:\n",
    ),
    Edit(
        name="own-mpirun",
        file="horovod/runner/mpi_run.py",
        why="horovodrun starts the mpirun of the MPI it was built with; that of another MPI makes N worlds of one rank",
        old="def mpi_available(env=None):\n",
        new='''def _mpirun():
    """The launcher that was recorded when this was built, else the one on PATH."""
    package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    try:
        with open(os.path.join(package, 'hvdtrain_build.json')) as stamp:
            path = os.path.join(sys.prefix, json.load(stamp)['mpirun'])
    except (OSError, ValueError, KeyError, TypeError):
        return 'mpirun'
    return quote(path) if os.access(path, os.X_OK) else 'mpirun'


def mpi_available(env=None):
''',
    ),
    Edit(
        name="own-mpirun-import",
        file="horovod/runner/mpi_run.py",
        why="for the above",
        old="import copy\nimport os\n",
        new="import copy\nimport json\nimport os\n",
    ),
    Edit(
        name="own-mpirun-version",
        file="horovod/runner/mpi_run.py",
        why="for the above",
        old="    command = 'mpirun --version'\n",
        new="    command = _mpirun() + ' --version'\n",
    ),
    Edit(
        name="own-mpirun-command",
        file="horovod/runner/mpi_run.py",
        why="for the above",
        old="        'mpirun {basic_args} '\n",
        new="        '{mpirun} {basic_args} '\n",
    ),
    Edit(
        name="own-mpirun-name",
        file="horovod/runner/mpi_run.py",
        why="for the above",
        old="        .format(basic_args=basic_args,\n",
        new="        .format(mpirun=_mpirun(),\n                basic_args=basic_args,\n",
    ),
    Edit(
        name="launcher-name",
        file="horovod/runner/mpi_run.py",
        why="ranks cannot tell horovodrun --mpi from mpirun otherwise",
        old="    env_list = '' if impi_or_mpich else ' '.join(\n",
        new="    env = dict(env, HVDTRAIN_LAUNCHER='horovodrun')\n    env_list = '' if impi_or_mpich else ' '.join(\n",
    ),
    Edit(
        name="mpirun-instead",
        file="horovod/runner/mpi_run.py",
        why="a shell that waits for mpirun hands no signal to it, and leaves it behind when it is killed",
        old="        os.execve('/bin/sh', ['/bin/sh', '-c', mpirun_command], env)\n",
        new="        os.execve('/bin/sh', ['/bin/sh', '-c', 'exec ' + mpirun_command], env)\n",
    ),
    Edit(
        name="guard",
        file="horovod/runner/launch.py",
        why="a signal to horovodrun lets the ranks save and end, and then horovodrun ends with their exit code",
        old="def run_commandline():\n    args = parse_args()\n",
        new="""def run_commandline():
    args = parse_args()
    try:
        from hvdtrain.launch.guard import fork_under
    except ImportError:
        pass
    else:
        fork_under()
""",
    ),
    Edit(
        name="stamp",
        file="setup.py",
        why="the package says what it was built for",
        old="      zip_safe=False,\n",
        new="      zip_safe=False,\n      package_data={'horovod': ['hvdtrain_build.json']},\n",
    ),
)


def apply(source: Path, version: str, cxx_standard: int, edits: Sequence[Edit] = EDITS) -> None:
    """Make the edits in a source tree; either all of them or none.

    Args:
        source: The folder with Horovod's ``setup.py``.
        version: Of the Horovod in it, for the message.
        cxx_standard: 17 or 20.
        edits: Which.

    Raises:
        BuildError: A file is missing, or a text does not occur as often as it must; names edit, file and version.
    """
    texts: dict[Path, str] = {}
    for edit in edits:
        path = source / edit.file
        if path not in texts:
            try:
                texts[path] = path.read_text(encoding="utf-8")
            except OSError as error:
                raise BuildError(_refusal(edit, version, f"the file cannot be read ({error.strerror})")) from error
        found = texts[path].count(edit.old)
        if found != edit.times:
            raise BuildError(
                _refusal(edit, version, f"expected {edit.times} times, found {found}: {edit.old.strip()!r}")
            )
        texts[path] = texts[path].replace(edit.old, edit.new.replace(CXX_STANDARD, str(cxx_standard)))
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")


def digest(edits: Sequence[Edit] = EDITS) -> str:
    """Changes whenever an edit does; part of the key of finished wheels."""
    parts = [f"{edit.file}\0{edit.old}\0{edit.new}\0{edit.times}" for edit in edits]
    return hashlib.sha256("\0\0".join(parts).encode()).hexdigest()[:12]


def _refusal(edit: Edit, version: str, what: str) -> str:
    return (
        f"the edit {edit.name!r} ({edit.why}) does not fit {edit.file} of Horovod {version}: {what}. "
        "The edits are made for Horovod 0.28.1; leave --source out to fetch that."
    )
