"""Fetches Horovod's source: from PyPI, or a file, folder or git repository that the user names."""

from __future__ import annotations

import ast
import hashlib
import os
import shutil
import tarfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hvdtrain.errors import ConfigError
from hvdtrain.horovod_build.failure import BuildError
from hvdtrain.horovod_build.running import Log, pip, run
from hvdtrain.horovod_build.wishes import HOROVOD, HOROVOD_SHA256

PYPI = "PyPI"
_FETCH_S = 900.0
_NOT_SOURCE = shutil.ignore_patterns(".git", "build", "dist", "*.so", "__pycache__", "*.egg-info")


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A source tree that may be edited.

    Attributes:
        folder: With ``setup.py``.
        version: Of Horovod.
        name: Names it exactly: ``PyPI``, or where it came from with a digest of its files.
    """

    folder: Path
    version: str
    name: str


def fetch(where: str | None, into: Path, *, environment: Mapping[str, str], log: Log) -> Source:
    """Get the source into a folder of its own.

    Args:
        where: None for PyPI, or a file, a folder, or ``git+URL[@REVISION]``.
        into: An empty folder.
        environment: For pip and git; pip needs setuptools from it to ask the sdist for its name.
        log: Takes their output.

    Raises:
        BuildError: It could not be fetched, or is no Horovod.
    """
    if where is None:
        return _tree(_from_pypi(into, environment, log), PYPI, digest=False)
    if where.startswith("git+"):
        return _tree(_from_git(where, into, environment, log), where, digest=True)
    path = Path(where).expanduser()
    if path.is_dir():
        folder = into / "source"
        shutil.copytree(path, folder, symlinks=True, ignore=_NOT_SOURCE)
        return _tree(folder, str(path.resolve()), digest=True)
    if path.is_file():
        return _tree(_unpack(path, into), str(path.resolve()), digest=True)
    raise ConfigError(f"--source {where!r} is neither a file nor a folder; for a repository write git+URL")


def _from_pypi(into: Path, environment: Mapping[str, str], log: Log) -> Path:
    # pip asks an sdist for its name by running its setup.py: the hash must be compared before, which pip does.
    wanted = into.with_name(f"{into.name}.txt")
    wanted.write_text(f"horovod=={HOROVOD} --hash=sha256:{HOROVOD_SHA256}\n")
    command = [*pip(), "download", "--no-deps", "--no-build-isolation", "--no-binary", "horovod", "--require-hashes"]
    command += ["--dest", str(into), "--requirement", str(wanted)]
    code, lines = run(command, log=log, environment=environment, folder=into, limit_s=_FETCH_S)
    files = sorted(into.glob("horovod-*"))
    if any("DO NOT MATCH THE HASHES" in line for line in lines) or (
        files and not code and _sha256(files[0]) != HOROVOD_SHA256
    ):
        raise BuildError(
            f"what pip fetched as Horovod {HOROVOD} is not the published file (SHA-256 {HOROVOD_SHA256}): an index or mirror "
            f"of pip's settings serves another. If it is one that you trust, fetch it and name it by --source. Log: {log.path}"
        )
    if code or not files:
        said = next((line for line in reversed(lines) if "ERROR" in line), lines[-1] if lines else "")
        raise BuildError(
            f"Horovod {HOROVOD} could not be fetched: {said.strip()}\n"
            f"Without a way to PyPI: fetch horovod-{HOROVOD}.tar.gz elsewhere and name it by --source. Log: {log.path}"
        )
    return _unpack(files[0], into)


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _from_git(where: str, into: Path, environment: Mapping[str, str], log: Log) -> Path:
    url, _, revision = where.removeprefix("git+").rpartition("@")
    if not url or "/" in revision:  # git+ssh://git@host/path has an @ of its own
        url, revision = where.removeprefix("git+"), ""
    folder = into / "source"
    quiet = {**environment, "GIT_TERMINAL_PROMPT": "0"}
    commands = [["git", "clone", url, str(folder)]]
    commands += [["git", "-C", str(folder), "checkout", "--detach", revision]] if revision else []
    commands += [["git", "-C", str(folder), "submodule", "update", "--init", "--recursive"]]
    for command in commands:
        code, lines = run(command, log=log, environment=quiet, folder=into, limit_s=_FETCH_S)
        if code:
            told = [line for line in lines if line.startswith(("fatal:", "error:"))] or lines[-1:]
            said = told[0].strip() if told else f"exit code {code}"
            raise BuildError(f"--source {where}: {' '.join(command[:4])} failed: {said}\nLog: {log.path}")
    shutil.rmtree(folder / ".git", ignore_errors=True)
    return folder


def _unpack(archive: Path, into: Path) -> Path:
    folder = into / "source"
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as file:
                file.extractall(folder)
        else:
            with tarfile.open(archive) as file:
                _extract(file, folder)
    except (OSError, tarfile.TarError, zipfile.BadZipFile, EOFError) as error:
        raise BuildError(f"{archive} cannot be unpacked: {error}") from error
    tops = [entry for entry in folder.iterdir() if entry.is_dir()]
    return tops[0] if len(tops) == 1 and not (folder / "setup.py").exists() else folder


def _extract(file: tarfile.TarFile, folder: Path) -> None:
    """Everything below ``folder``, nothing outside it."""
    if hasattr(tarfile, "data_filter"):
        file.extractall(folder, filter="data")
        return
    root = folder.resolve()
    for member in file.getmembers():  # a Python that has no filters yet
        if not (root / member.name).resolve().is_relative_to(root) or not (member.isfile() or member.isdir()):
            raise tarfile.TarError(f"refused: {member.name}")
    file.extractall(folder)


def _tree(folder: Path, name: str, *, digest: bool) -> Source:
    try:
        tree = ast.parse((folder / "horovod" / "__init__.py").read_text(encoding="utf-8"))
        (folder / "setup.py").stat()
    except (OSError, SyntaxError) as error:
        raise BuildError(f"{name} holds no source of Horovod: {error}") from error
    version = next(
        (
            str(node.value.value)
            for node in tree.body
            if isinstance(node, ast.Assign)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.targets[0], ast.Name)
            if node.targets[0].id == "__version__"
        ),
        "",
    )
    if not version:
        raise BuildError(f"{name}: horovod/__init__.py states no version")
    return Source(folder=folder, version=version, name=f"{name} ({_digest(folder)})" if digest else name)


def _digest(folder: Path) -> str:
    """Of all files and their names."""
    total = hashlib.sha256()
    for parent, folders, files in os.walk(folder):
        folders.sort()
        for name in sorted(files):
            path = Path(parent, name)
            total.update(str(path.relative_to(folder)).encode() + b"\0")
            total.update(os.readlink(path).encode() if path.is_symlink() else path.read_bytes())
    return total.hexdigest()[:12]
