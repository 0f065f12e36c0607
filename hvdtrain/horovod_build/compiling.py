"""Runs the build that a plan describes: fetches build tools, edits the source, compiles, and hands back a wheel."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from hvdtrain.backends.hvd.stamp import FILE, Stamp
from hvdtrain.horovod_build import edits
from hvdtrain.horovod_build.failure import BuildError
from hvdtrain.horovod_build.nvidia import fetch_toolkit, links_to_nccl, torch_architectures
from hvdtrain.horovod_build.plan import AS_TORCH, Plan, clean
from hvdtrain.horovod_build.probe import Cuda
from hvdtrain.horovod_build.running import Log, Reporter, pip, run
from hvdtrain.horovod_build.source import Source

# setuptools 81 drops pkg_resources, and will drop setup.py commands; the build has its own, whatever the user's is.
_BUILD_TOOLS = ("setuptools>=70.1,<81", "packaging>=23")
_CMAKE = "cmake>=3.26"
_NINJA = "ninja>=1.11"
_TOOLS_S = 900.0
# Settings of the user's pip that are meant for packages that he installs.
_PIP_PLACES = ("PIP_CONSTRAINT", "PIP_TARGET", "PIP_PREFIX", "PIP_ROOT", "PIP_USER", "PIP_REQUIRE_HASHES")
_BUILD_S = 7200.0
_STEP = re.compile(r"\[\s*(?:(?P<percent>\d+)%|(?P<done>\d+)/(?P<all>\d+))\]\s+(?P<what>.*)")
_FAILURE = re.compile(r"CMake Error|\berror:|\bfatal error|undefined reference|No space left|Killed|^\s*ERROR: |Error:")


def build_environment(plan: Plan, base: Mapping[str, str], tools: Path, cuda: Cuda | None) -> dict[str, str]:
    """All variables of the build.

    Args:
        plan: What to build.
        base: The user's variables.
        tools: Where `fetch_tools` put its packages.
        cuda: The toolkit, for a build with NCCL.
    """
    environment = {**clean(base), **plan.environment}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(tools), base.get("PYTHONPATH")]))
    folders = [os.path.join(cuda.home, "bin")] if cuda else []
    folders += [str(tools / "bin"), *([str(Path(plan.cmake.path).parent)] if plan.cmake else []), base.get("PATH", "")]
    environment["PATH"] = os.pathsep.join(folders)
    environment["HOROVOD_CMAKE"] = plan.cmake.path if plan.cmake else str(tools / "bin" / "cmake")
    environment["CMAKE_BUILD_PARALLEL_LEVEL"] = str(plan.jobs)
    environment["MAKEFLAGS"] = f"-j{plan.jobs}"  # without it Horovod's setup.py says -j8
    if not plan.make:
        environment["CMAKE_GENERATOR"] = "Ninja"
    # Headers of gcc 13 and later no longer bring <cstdint> along, which Gloo's need.
    environment["CXXFLAGS"] = f"{base.get('CXXFLAGS', '')} -include cstdint".strip()
    environment["PIP_USE_PEP517"] = "1"  # else an older pip runs setup.py itself, which fetches what it wants
    if cuda:
        environment |= {"CUDA_HOME": cuda.home, "HOROVOD_CUDA_HOME": cuda.home, "CUDACXX": f"{cuda.home}/bin/nvcc"}
    return environment


def fetch_tools(plan: Plan, into: Path, *, environment: Mapping[str, str], log: Log) -> None:
    """Get the build tools that are not here into a folder of their own; the user's environment stays as it is.

    Raises:
        BuildError: pip could not get them.
    """
    wanted = [*_BUILD_TOOLS, *([] if plan.cmake else [_CMAKE]), *([] if plan.make else [_NINJA])]
    command = [*pip(), "install", "--target", str(into), "--no-warn-script-location", *wanted]
    kept = {name: value for name, value in environment.items() if name not in _PIP_PLACES}
    code, lines = run(command, log=log, environment=kept, folder=into.parent, limit_s=_TOOLS_S)
    if code:
        raise BuildError(f"the build tools {', '.join(wanted)} could not be fetched: {_why(lines)}\nLog: {log.path}")


def compile_wheel(
    plan: Plan, source: Source, work: Path, *, base: Mapping[str, str], log: Log, reporter: Reporter
) -> tuple[Path, Stamp]:
    """Build the wheel.

    Args:
        plan: What to build.
        source: Is edited.
        work: An empty folder for everything else.
        base: The user's variables.
        log: Takes all output.
        reporter: Is told how far the compilation is.

    Returns:
        The wheel, and the stamp that lies in it.

    Raises:
        BuildError: An edit does not fit, or the build failed; quotes the first error and names the log.
    """
    tools = work / "tools"
    cuda = plan.cuda
    if plan.fetch_nvcc:
        reporter.show(None, f"fetching NVIDIA's compiler for CUDA {plan.fetch_nvcc} from PyPI")
        cuda = fetch_toolkit(plan.fetch_nvcc, base, log=log)
    environment = build_environment(plan, base, tools, cuda)
    stamp = plan.stamp
    if plan.nccl is not None and cuda is not None:
        if stamp.cuda_arch == (AS_TORCH,):
            stamp = replace(stamp, cuda_arch=torch_architectures(cuda, environment, log=log, folder=work))
        environment["HOROVOD_BUILD_CUDA_CC_LIST"] = ",".join(arch.replace(".", "") for arch in stamp.cuda_arch)
        environment["HOROVOD_NCCL_HOME"] = str(links_to_nccl(plan.nccl, work / "nccl"))
    edits.apply(source.folder, source.version, stamp.cxx_standard)
    (source.folder / "horovod" / FILE).write_text(stamp.text(), encoding="utf-8")

    def watch(line: str) -> None:
        step = _STEP.search(line)
        if step:
            fraction = int(step["percent"]) / 100 if step["percent"] else int(step["done"]) / max(1, int(step["all"]))
            reporter.show(fraction, _file_of(step["what"]))

    reporter.show(None, "configuring")
    command = [*pip(), "wheel", "--verbose", "--no-build-isolation", "--no-deps", "--no-cache-dir"]
    command += ["--wheel-dir", str(work / "wheel"), str(source.folder)]
    code, lines = run(command, log=log, environment=environment, folder=work, limit_s=_BUILD_S, watch=watch)
    wheels = sorted((work / "wheel").glob("horovod-*.whl")) if (work / "wheel").is_dir() else []
    if code or not wheels:
        raise BuildError(f"Horovod did not compile: {_why(lines)}\nThe whole log: {log.path}")
    return wheels[0], stamp


def _file_of(step: str) -> str:
    """The file that a line of make or Ninja is about."""
    if step.startswith("Building"):
        return f"compiling {Path(step.rsplit(maxsplit=1)[-1]).name.removesuffix('.o')}"
    return step[:1].lower() + step[1:]


def _why(lines: list[str]) -> str:
    """The first lines of a build's output that name an error, else its last ones."""
    found = [index for index, line in enumerate(lines) if _FAILURE.search(line)]
    chosen = lines[found[0] : found[0] + 6] if found else lines[-6:]
    return "\n  ".join(line.strip() for line in chosen) if chosen else "no output"
