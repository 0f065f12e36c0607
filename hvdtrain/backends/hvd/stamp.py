"""What the installed Horovod was built for, read from files: neither horovod nor torch is imported.

``hvdtrain install-horovod`` leaves a small JSON file in the package that it builds, the stamp. Horovod's extension fits
one version of torch and one of Python; loaded into others it fails with an undefined symbol, or crashes. `why_not`
says so beforehand, with the command that mends it. A Horovod installed by other means has no stamp: it is taken if its
extension is there for this Python. Nothing here proves that the extension loads; importing it does.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import os
import platform
import sys
import sysconfig
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

FILE = "hvdtrain_build.json"
COMMAND = "hvdtrain install-horovod"


@dataclass(frozen=True, kw_only=True, slots=True)
class Stamp:
    """How one Horovod was built.

    Attributes:
        horovod: Its version.
        torch: `torch.__version__`, with the local part ("2.13.0+cu130").
        python: The suffix of extension modules, which holds version, ABI and platform.
        cxx_standard: 17 or 20.
        compiler: Its first line of ``--version``.
        mpi: What MPI_Get_library_version says; None when built without MPI.
        mpirun: The launcher of that MPI; relative to `sys.prefix` when it lies inside.
        libmpi: The library; relative to `sys.prefix` when it lies inside.
        gloo: Built with Gloo.
        nccl: NCCL's version; None when built without.
        cuda: Version of the CUDA compiler; None when built without.
        cuda_arch: Compute capabilities that it holds code for ("8.0").
        edits: Names of the edits made to Horovod's source.
        source: Where the source came from.
        key: Of the wheel in the cache: equal keys are equal builds.
        hvdtrain: The version that built it.
    """

    horovod: str
    torch: str
    python: str
    cxx_standard: int
    compiler: str
    mpi: str | None
    mpirun: str | None
    libmpi: str | None
    gloo: bool
    nccl: str | None
    cuda: str | None
    cuda_arch: tuple[str, ...]
    edits: tuple[str, ...]
    source: str
    key: str
    hvdtrain: str

    def text(self) -> str:
        """As JSON."""
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"

    @classmethod
    def parse(cls, text: str) -> Stamp | None:
        """The stamp in a text; None when it is damaged, or of a version of hvdtrain with other fields."""
        try:
            values = json.loads(text)
            known = {field.name for field in dataclasses.fields(cls)}
            values = {name: value for name, value in values.items() if name in known}
            return cls(**{**values, "cuda_arch": tuple(values["cuda_arch"]), "edits": tuple(values["edits"])})
        except (ValueError, TypeError, KeyError, AttributeError):
            return None


@dataclass(frozen=True, kw_only=True, slots=True)
class Installed:
    """The Horovod that ``import horovod`` would find.

    Attributes:
        folder: Of the package.
        stamp: None when it was not built by hvdtrain.
        extensions: The extension modules for torch in it, for any Python.
    """

    folder: Path
    stamp: Stamp | None
    extensions: tuple[str, ...]

    @property
    def has_extension(self) -> bool:
        """Whether there is one for this Python."""
        return f"mpi_lib_v2{extension_suffix()}" in self.extensions


def installed() -> Installed | None:
    """The Horovod of this environment, or None."""
    folder = _package("horovod")
    if folder is None:
        return None
    try:
        stamp = Stamp.parse((folder / FILE).read_text())
    except OSError:
        stamp = None
    extensions = tuple(sorted(file.name for file in (folder / "torch").glob("mpi_lib_v2*.so")))
    return Installed(folder=folder, stamp=stamp, extensions=extensions)


def torch_version() -> str | None:
    """`torch.__version__` of this environment; None without torch."""
    return torch_facts().get("__version__")


def torch_facts() -> dict[str, str | None]:
    """The strings that torch's ``version.py`` holds (``__version__``, ``cuda``, ``hip``); {} without torch."""
    folder = _package("torch")
    if folder is None:
        return {}
    try:
        tree = ast.parse((folder / "version.py").read_text())
    except (OSError, SyntaxError):
        return {}
    found: dict[str, str | None] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign):
            targets = node.targets
        elif isinstance(node, ast.AnnAssign):
            targets = [node.target]
        else:
            continue
        for target in targets:
            if isinstance(target, ast.Name) and isinstance(node.value, ast.Constant):
                value = node.value.value
                found[target.id] = value if isinstance(value, str) else None
    return found


def extension_suffix() -> str:
    """What extension modules of this Python end with: ``.cpython-311-x86_64-linux-gnu.so``."""
    return str(sysconfig.get_config_var("EXT_SUFFIX") or ".so")


def why_not() -> str:
    """Why ``import horovod.torch`` cannot work here, with the command that mends it; "" if nothing is against it."""
    torch = torch_version()
    if torch is None:
        return "Horovod needs torch, which is not installed; type: pip install torch"
    found = installed()
    if found is None:
        return f"Horovod is not installed; type: {COMMAND}"
    if not found.extensions:
        return f"the Horovod in {found.folder} was built without torch; type: {COMMAND}"
    if not found.has_extension:
        names = ", ".join(name.removeprefix("mpi_lib_v2.").removesuffix(".so") for name in found.extensions)
        return (
            f"the Horovod in {found.folder} was built for another Python ({names}), this is "
            f"{platform.python_version()}; type: {COMMAND}"
        )
    return _unlike(found.stamp, torch) if found.stamp else ""


def _unlike(stamp: Stamp, torch: str) -> str:
    """What of a build's surroundings has changed since; "" if nothing."""
    if stamp.torch != torch:
        return f"Horovod {stamp.horovod} was built for torch {stamp.torch}, and this is torch {torch}; type: {COMMAND}"
    if stamp.libmpi is not None and not os.path.exists(_here(stamp.libmpi)):
        return (
            f"Horovod {stamp.horovod} was built with {short_library(stamp.mpi)}, whose {_here(stamp.libmpi)} is gone; "
            f"install that MPI again, or type: {COMMAND}"
        )
    return ""


def _package(name: str) -> Path | None:
    """The folder of a regular package, found without importing it."""
    try:
        spec = find_spec(name)
    except (ImportError, ValueError, AttributeError):
        return None
    if spec is None or not spec.origin or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


def _here(path: str) -> str:
    """A path that may be relative to the environment."""
    return os.path.join(sys.prefix, path)


def short_library(library: str | None) -> str:
    """The name and version in what MPI_Get_library_version says."""
    return (library or "MPI").partition(",")[0].splitlines()[0]
