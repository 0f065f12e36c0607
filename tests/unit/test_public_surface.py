"""What users may build on is written down in public_surface.txt beside this file, and is what the package has.

python tests/unit/test_public_surface.py --write     # after a change that is meant; docs/api_stability.md says which may be made
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hvdtrain
from hvdtrain.settings.config import TrainConfig
from hvdtrain.settings.options import options_of

ROOT = Path(__file__).resolve().parents[2]
WRITTEN = Path(__file__).with_name("public_surface.txt")
BESIDE = [  # public, and not under one of the doors
    "hvdtrain.data.arrays.ArrayDataset",
    "hvdtrain.data.digits.digits",
    "hvdtrain.tasks.byte_language_model.ByteLanguageModel",
    "hvdtrain.training.mirror.Mirror",
    "hvdtrain.training.stopping.StopRequest",
]
DOORS = ["hvdtrain", "hvdtrain.errors", "hvdtrain.horovod", "hvdtrain.horovod.elastic", "hvdtrain.nn"]


def names_of(door: Any) -> list[str]:
    """A module's public names: those of ``__all__``, or else its classes and what it imports under their own name."""
    if hasattr(door, "__all__"):
        return sorted(door.__all__)
    source = Path(door.__file__).read_text()
    imported = {one for one, other in re.findall(r"import (\w+) as (\w+)$", source, re.M) if one == other}
    return sorted((imported - {"VERSION"}) | set(re.findall(r"^(?:class|def) ([A-Za-z]\w*)", source, re.M)))


def parameters(function: Any) -> str:
    """Names, kinds and defaults, without types."""
    shown = []
    signature = inspect.signature(function)
    for parameter in signature.parameters.values():
        simple = parameter.default is None or isinstance(parameter.default, bool | int | float | str | tuple)
        default = parameter.empty if parameter.default is parameter.empty else parameter.default if simple else ...
        shown.append(parameter.replace(annotation=parameter.empty, default=default))
    return str(signature.replace(parameters=shown, return_annotation=signature.empty)).replace("Ellipsis", "...")


def described(path: str, value: Any) -> Iterator[str]:
    """One public name, and what a class has under it."""
    if inspect.isclass(value):
        made_by_users = not issubclass(value, BaseException) and not getattr(value, "_is_protocol", False)
        yield f"{path}{parameters(value) if made_by_users else ''}"
        for name, member in inspect.getmembers(value):
            if name.startswith("_") or not (getattr(member, "__module__", None) or "hvdtrain").startswith("hvdtrain"):
                continue
            if isinstance(member, property) or (not callable(member) and name in vars(value)):
                yield f"{path}.{name}"
            elif inspect.isfunction(member) or inspect.ismethod(member):
                yield f"{path}.{name}{parameters(member)}"
    elif inspect.isfunction(value):
        yield f"{path}{parameters(value)}"
    else:
        yield path


def surface() -> list[str]:
    """Every line of the file."""
    lines: list[str] = []
    for name in DOORS:
        door = importlib.import_module(name)
        for public in names_of(door):
            lines += described(f"{name}.{public}", getattr(door, public))
    for path in BESIDE:
        module, _, name = path.rpartition(".")
        lines += described(path, getattr(importlib.import_module(module), name))
    lines += [f"hvdtrain --{entry.flag.removeprefix('--')}" for entry in options_of(TrainConfig)]
    return sorted(set(lines))


def test_the_public_surface_is_what_is_written_down():
    written = WRITTEN.read_text().splitlines()
    gone, new = sorted(set(written) - set(surface())), sorted(set(surface()) - set(written))
    remedy = (
        f"docs/api_stability.md says what may change; python {Path(__file__).relative_to(ROOT)} --write writes it down"
    )
    assert gone == new == [], "\n".join([*(f"- {line}" for line in gone), *(f"+ {line}" for line in new), remedy])


def test_the_reference_has_every_public_name_once():
    pages = [page.read_text() for page in sorted((ROOT / "docs" / "reference").glob("*.md"))]
    shown = [name for page in pages for name in re.findall(r"^::: (\S+)$", page, re.M)]
    assert len(shown) == len(set(shown))
    constants = {f"hvdtrain.horovod.{name}" for name in re.findall(r"`hvd\.(\w+)`", "".join(pages))}
    wanted = {f"hvdtrain.{name}" for name in hvdtrain.__all__} - {"hvdtrain.__version__", "hvdtrain.nn"}
    wanted |= {f"hvdtrain.horovod.{name}" for name in names_of(importlib.import_module("hvdtrain.horovod"))}
    wanted |= {f"hvdtrain.nn.{name}" for name in names_of(hvdtrain.nn)} | set(BESIDE)
    assert wanted - set(shown) - constants == set()


if __name__ == "__main__":
    text = "\n".join(surface()) + "\n"
    if "--write" in sys.argv:
        WRITTEN.write_text(text)
    else:
        sys.stdout.write(text)
