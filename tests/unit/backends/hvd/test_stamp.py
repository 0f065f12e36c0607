"""Whether a Horovod fits this environment is told from its files, without importing it."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hvdtrain.backends.hvd import stamp as horovod_stamp
from hvdtrain.backends.hvd.stamp import FILE, Stamp, extension_suffix, installed, torch_version, why_not

STAMP = Stamp(
    horovod="0.28.1", torch=torch.__version__, python=extension_suffix(), cxx_standard=20, compiler="g++ 12.2.0",
    mpi="Open MPI v5.0.11, package: x", mpirun="bin/python", libmpi="bin/python", gloo=True, nccl=None, cuda=None,
    cuda_arch=(), edits=("a", "b"), source="PyPI", key="0123456789abcdef", hvdtrain="0.1.0",
)  # fmt: skip


@pytest.fixture
def package(tmp_path, monkeypatch) -> Path:
    """A folder shaped as an installed Horovod, found before any other."""
    folder = tmp_path / "horovod"
    (folder / "torch").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('it was imported')")
    (folder / "torch" / f"mpi_lib_v2{extension_suffix()}").write_text("")
    (folder / FILE).write_text(STAMP.text())
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "horovod", raising=False)
    return folder


def stamped(package: Path, **changes) -> None:
    (package / FILE).write_text(dataclasses.replace(STAMP, **changes).text())


def test_a_stamp_is_read_back_as_it_was_written():
    assert Stamp.parse(STAMP.text()) == STAMP


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", "{}", '{"horovod": "0.28.1"}'])
def test_a_damaged_stamp_is_none(text):
    assert Stamp.parse(text) is None


def test_a_stamp_with_a_field_of_a_later_version_is_read():
    assert Stamp.parse(STAMP.text().replace('"gloo"', '"later": 1, "gloo"')) == STAMP


def test_the_right_horovod_has_nothing_against_it(package):
    found = installed()
    assert found is not None
    assert found.folder == package
    assert found.stamp == STAMP
    assert found.has_extension
    assert why_not() == ""


def test_a_horovod_that_is_missing_is_said_with_the_command(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "path", [str(tmp_path), *(path for path in sys.path if "site-packages" not in path)])
    monkeypatch.setattr(sys, "meta_path", [finder for finder in sys.meta_path if "editable" not in str(finder).lower()])
    monkeypatch.setattr(horovod_stamp, "torch_version", lambda: "2.13.0")
    monkeypatch.delitem(sys.modules, "horovod", raising=False)
    assert installed() is None
    assert why_not() == "Horovod is not installed; type: hvdtrain install-horovod"


def test_another_torch_is_said_with_both_versions(package):
    stamped(package, torch="2.0.1")
    assert why_not() == (
        f"Horovod 0.28.1 was built for torch 2.0.1, and this is torch {torch.__version__}; type: hvdtrain install-horovod"
    )


def test_the_same_torch_for_another_cuda_is_another_torch(package):
    stamped(package, torch=torch.__version__.partition("+")[0] + "+cu999")
    assert "was built for torch" in why_not()


def test_an_extension_for_another_python_is_said(package):
    file = package / "torch" / f"mpi_lib_v2{extension_suffix()}"
    file.rename(file.with_name("mpi_lib_v2.cpython-36m-x86_64-linux-gnu.so"))
    said = why_not()
    assert "was built for another Python (cpython-36m-x86_64-linux-gnu)" in said
    assert said.endswith("type: hvdtrain install-horovod")


def test_a_horovod_without_torch_is_said(package):
    (package / "torch" / f"mpi_lib_v2{extension_suffix()}").unlink()
    assert why_not() == f"the Horovod in {package} was built without torch; type: hvdtrain install-horovod"


def test_an_mpi_that_was_removed_since_is_said(package):
    stamped(package, libmpi="lib/libmpi.so.99")
    assert why_not().startswith(
        f"Horovod 0.28.1 was built with Open MPI v5.0.11, whose {sys.prefix}/lib/libmpi.so.99 is gone"
    )


@pytest.mark.parametrize("text", [None, "damaged"])
def test_a_horovod_by_other_means_is_taken_if_its_extension_is_there(package, text):
    (package / FILE).unlink()
    if text:
        (package / FILE).write_text(text)
    found = installed()
    assert found is not None
    assert found.stamp is None
    assert why_not() == ""


def test_a_folder_that_is_no_package_is_no_horovod(package, monkeypatch):
    (package / "__init__.py").unlink()
    found = installed()
    assert found is None or found.folder != package


def test_torchs_version_is_the_one_it_says_itself():
    assert torch_version() == torch.__version__
    assert horovod_stamp.torch_facts().get("cuda") == torch.version.cuda


def test_asking_imports_neither_torch_nor_horovod():
    code = (
        "import sys; from hvdtrain.backends.hvd.stamp import why_not; why_not()\n"
        "sys.exit(bool({'torch', 'horovod'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
