"""Reading a script as a tree that keeps every blank and comment, or saying why that cannot be."""

from __future__ import annotations

from pathlib import Path

import libcst as cst

from hvdtrain.errors import ConfigError

_LARGEST_BYTES = 5_000_000


def read(path: Path) -> cst.Module:
    """Parse a file.

    Raises:
        ConfigError: It is not there, cannot be read, or is no Python of this version; says where.
    """
    try:
        if path.stat().st_size > _LARGEST_BYTES:
            raise ConfigError(f"{path} has {path.stat().st_size:,} bytes, which is no script; name a .py file")
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from error
    if b"\0" in content:
        raise ConfigError(f"{path} is a binary file; name a .py file")
    if path.suffix == ".ipynb":
        raise ConfigError(f"{path} is a notebook; export it first: jupyter nbconvert --to script {path}")
    module = _parsed(path, content)
    if module.bytes != content:  # old Macintosh line ends
        raise ConfigError(
            f"{path} would not keep its bytes where nothing is to change (line ends?); end its lines with \\n"
        )
    return module


def _parsed(path: Path, content: bytes) -> cst.Module:
    try:
        return cst.parse_module(content)
    except cst.ParserSyntaxError as error:
        where = f"{path}:{error.raw_line}"
        raise ConfigError(f"{where}: no Python that can be read ({error.message.splitlines()[0]})") from error
    except (UnicodeDecodeError, SyntaxError, LookupError) as error:
        raise ConfigError(f"{path} is no text in the encoding that it names, or in UTF-8: {error}") from error
    except RecursionError as error:
        raise ConfigError(f"{path} is nested too deeply to be read") from error


def write(path: Path, module: cst.Module) -> None:
    """Write a file beside and rename it, with the permissions that the script had.

    Raises:
        ConfigError: It cannot be written.
    """
    beside = path.with_name(f".{path.name}.migrating")
    try:
        target = path.resolve()  # a link stays a link
        mode = target.stat().st_mode
        if not mode & 0o222:
            raise ConfigError(f"{path} cannot be written: it is read-only; chmod u+w {path}")
        beside = target.with_name(f".{target.name}.migrating")
        beside.write_bytes(module.bytes)
        beside.chmod(mode & 0o7777)
        beside.replace(target)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise ConfigError(f"{path} cannot be written: {error.strerror or error}") from error
