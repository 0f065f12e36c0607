"""Data sets by name and by import path; torchvision's are in test_vision.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset, TensorDataset

from hvdtrain.data.arrays import ArrayDataset
from hvdtrain.data.named import NamedData, load_data
from hvdtrain.errors import ConfigError, DataError
from hvdtrain.settings.options import Component

HERE = __name__


def load(name: str, folder: Path = Path("unused"), **args: Any) -> NamedData:
    return load_data(Component(name, args), folder=folder, download=True, timeout_s=5)


def test_the_digits_are_there_and_need_no_folder(tmp_path: Path) -> None:
    data = load("digits", tmp_path / "data")
    assert (data.shape, data.classes, len(data.train), len(data.evaluation)) == ((1, 8, 8), 10, 1437, 360)  # type: ignore[arg-type]
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("shape", ["3x4x5", "3,4,5", "[3, 4, 5]", (3, 4, 5), [3, 4, 5]])
def test_synthetic_data_takes_any_shape(shape: Any) -> None:
    data = load("synthetic", samples=6, eval_samples=4, shape=shape, classes=7)
    assert (data.shape, data.classes, len(data.train), len(data.evaluation)) == ((3, 4, 5), 7, 6, 4)  # type: ignore[arg-type]
    assert data.train[0][0].shape == (3, 4, 5)


def test_synthetic_data_is_like_imagenet_unless_told_otherwise() -> None:
    data = load("synthetic")
    assert (data.shape, data.classes) == ((3, 224, 224), 1000)
    assert not torch.equal(data.train[0][0], data.evaluation[0][0])  # type: ignore[index]


def test_a_shape_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--data\.shape must be like 3x224x224, got 'large'"):
        load("synthetic", shape="large")


@pytest.mark.parametrize(
    ("name", "nearest"), [("mnits", "mnist"), ("fashionmnist", "fashion-mnist"), ("digit", "digits")]
)
def test_an_unknown_name_is_answered_with_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=f"--data does not know '{name}'; did you mean '{nearest}'"):
        load(name)


def test_an_unknown_argument_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"synthetic has no argument 'sample'; did you mean 'samples'"):
        load("synthetic", sample=3)


def without_torchvision(how: str, tmp_path: Path) -> str:
    """What ``mnist`` is answered where torchvision's import fails; run in a process of its own."""
    script = f"""
import sys
from pathlib import Path
{how}
from hvdtrain.data.named import load_data
from hvdtrain.errors import ConfigError
from hvdtrain.settings.options import Component
load_data(Component("digits"), folder=Path("unused"), download=True, timeout_s=5)
try:
    load_data(Component("mnist"), folder=Path("unused"), download=True, timeout_s=5)
except ConfigError as error:
    print(error)
"""
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True, cwd=tmp_path
    ).stdout


def test_a_missing_torchvision_is_answered_with_the_command_that_installs_it(tmp_path: Path) -> None:
    told = without_torchvision("sys.modules['torchvision'] = None", tmp_path)
    assert told.startswith("--data mnist needs torchvision")
    assert "pip install 'hvdtrain[vision]'" in told


def test_a_torchvision_for_another_torch_is_answered_with_what_to_install(tmp_path: Path) -> None:
    # What torchvision 0.28.0 does beside torch 2.13.0+cpu.
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    told = without_torchvision(f"sys.path.insert(0, {str(tmp_path)!r})", tmp_path)
    assert "operator torchvision::nms does not exist" in told
    assert f"another torch than the {torch.__version__} installed here" in told
    assert "pip install --force-reinstall torch torchvision" in told


def test_digits_do_not_load_torchvision(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from hvdtrain.data.named import load_data; "
        "from hvdtrain.settings.options import Component; "
        "load_data(Component('digits'), folder=Path('unused'), download=True, timeout_s=5); "
        "print('torchvision' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert found.stdout == "False\n"


# -- import paths -----------------------------------------------------------------------------------------------------


class Squares(Dataset[Any]):
    classes = ("odd", "even")

    def __init__(self, size: int, train: bool) -> None:
        self.size, self.train = size, train

    def __len__(self) -> int:
        return 6 if self.train else 2

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.full((1, self.size, self.size), float(index)), index % 2


def one_part() -> Dataset[Any]:
    return ArrayDataset(torch.zeros(4, 2, 3), torch.tensor([0, 2, 1, 0]))


def two_parts() -> tuple[Dataset[Any], Dataset[Any]]:
    return TensorDataset(torch.zeros(4, 5), torch.rand(4)), TensorDataset(torch.zeros(2, 5), torch.rand(2))


def whole() -> NamedData:
    return NamedData(train=one_part(), evaluation=None, shape=(9,), classes=99)


def no_data() -> int:
    return 3


def nothing() -> Dataset[Any]:
    return ArrayDataset(torch.zeros(0, 2))


def not_there(download: bool = False) -> Dataset[Any]:
    raise RuntimeError("Dataset not found. You can use download=True to download it")


def in_turns(download: bool, root: str) -> Dataset[Any]:
    assert (Path(root) / f".hvdtrain-{HERE}.in_turns.lock").exists()
    return one_part()


def test_a_class_that_takes_train_is_made_for_both_parts() -> None:
    data = load(f"{HERE}:Squares", size=3)
    assert (data.shape, data.classes, len(data.train), len(data.evaluation)) == ((1, 3, 3), 2, 6, 2)  # type: ignore[arg-type]
    assert load(f"{HERE}:Squares", size=3, train=True).evaluation is None


def test_a_function_may_return_one_data_set_a_pair_or_everything() -> None:
    data = load(f"{HERE}:one_part")
    assert (data.shape, data.classes, data.evaluation) == ((2, 3), 3, None)
    data = load(f"{HERE}:two_parts")
    assert (data.shape, data.classes, len(data.evaluation)) == ((5,), 0, 2)  # type: ignore[arg-type]
    assert load(f"{HERE}:whole").classes == 99


def test_what_is_no_data_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"no_data made a int, which is no data set"):
        load(f"{HERE}:no_data")
    with pytest.raises(DataError, match="nothing made a data set without samples"):
        load(f"{HERE}:nothing")
    with pytest.raises(DataError, match="not_there failed: RuntimeError: Dataset not found"):
        load(f"{HERE}:not_there")


def test_where_it_may_download_the_ranks_of_a_node_take_turns(tmp_path: Path) -> None:
    assert load(f"{HERE}:in_turns", tmp_path, download=True, root=str(tmp_path)).classes == 3


def test_torchvision_classes_by_import_path_give_tensors(tmp_path: Path) -> None:
    try:
        import torchvision  # noqa: F401
    except Exception as error:
        pytest.skip(f"torchvision cannot be imported: {error}")
    data = load("torchvision.datasets.FakeData", size=4, image_size=(3, 6, 7), num_classes=5)
    assert data.shape == (3, 6, 7)
    with pytest.raises(DataError, match=r"torchvision\.datasets\.KMNIST failed"):
        load("torchvision.datasets.KMNIST", root=str(tmp_path))
