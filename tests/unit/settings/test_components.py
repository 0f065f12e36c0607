"""Named components against real torch and torchvision: found, checked by argument, refused with the nearest name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hvdtrain.errors import ConfigError
from hvdtrain.settings.components import resolve
from hvdtrain.settings.options import Component

OPTIM = {"where": ("torch.optim",), "flag": "--optimizer", "provided": ("params", "lr")}


def weights() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.ones(3))]


@pytest.mark.parametrize("name", ["SGD", "sgd", "torch.optim.SGD", "torch.optim:SGD", "torch.optim.sgd:SGD"])
def test_an_optimizer_is_found_by_short_name_and_by_import_path(name: str) -> None:
    found = resolve(Component(name, {"momentum": 0.9}), **OPTIM)
    optimizer = found(weights(), lr=0.1)
    assert type(optimizer) is torch.optim.SGD
    assert (optimizer.defaults["lr"], optimizer.defaults["momentum"]) == (0.1, 0.9)


def test_a_scheduler_is_found_and_gets_its_arguments() -> None:
    component = Component("torch.optim.lr_scheduler.StepLR", {"step_size": 2, "gamma": 0.5})
    found = resolve(component, flag="--schedule", provided=("optimizer",))
    assert found(torch.optim.SGD(weights(), lr=1.0)).gamma == 0.5


def test_an_alias_table_comes_before_the_modules_after_it() -> None:
    found = resolve(
        Component("mlp"),
        where=({"mlp": torch.nn.Linear}, "torch.nn"),
        flag="--model",
        provided=("in_features", "out_features"),
    )
    assert found.target is torch.nn.Linear
    assert type(found(2, 3)) is torch.nn.Linear


def test_a_torchvision_model_gets_its_arguments() -> None:
    pytest.importorskip("torchvision", reason="needs torchvision")
    for name in ("resnet18", "torchvision.models.resnet18", "torchvision.models:resnet18"):
        found = resolve(Component(name, {"num_classes": 7}), where=("torchvision.models",), flag="--model")
        assert found().fc.out_features == 7


def test_a_torchvision_model_refuses_an_argument_with_the_nearest_one() -> None:
    pytest.importorskip("torchvision", reason="needs torchvision")
    found = resolve(Component("torchvision.models.resnet18", {"num_clases": 7}), flag="--model")
    with pytest.raises(ConfigError, match=r"--model torchvision.models.resnet18\(num_clases=7\) .*mean 'num_classes'"):
        found()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tourch.optim.SGD", "--optimizer: there is no module 'tourch'; did you mean 'torch'?"),
        ("torch.optm.SGD", "--optimizer: torch has no 'optm'; did you mean 'optim'?"),
        ("torch.optim.SDG", "--optimizer: torch.optim has no 'SDG'; did you mean 'SGD'?"),
        ("torch.optim:SDG", "--optimizer: torch.optim has no 'SDG'; did you mean 'SGD'?"),
        ("torch.optm:SGD", "--optimizer: torch has no 'optm'; did you mean 'optim'?"),
        ("torch.optim.SGD.stepp", "--optimizer: SGD has no 'stepp'; did you mean 'step'?"),
        ("qqqzzz_q.like:This", "there is no module 'qqqzzz_q'; install it, or run from the folder that holds"),
        ("adamm", r"--optimizer does not know 'adamm'; did you mean 'Adam(W|ax)?'\?.* package.module:Name"),
        ("torch.optim", "--optimizer 'torch.optim' is a module, which cannot be called"),
        ("torch.pi.__doc__", "cannot be called|has no"),
        ("math.pi", "--optimizer 'math.pi' is a float, which cannot be called"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest_one(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(Component(name), **OPTIM)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            {"momentm": 0.9},
            "--optimizer.momentm: SGD has no argument 'momentm'; did you mean 'momentum'.* It takes mom",
        ),
        ({"lr": 0.9}, "--optimizer.lr cannot be given: hvdtrain gives SGD this argument itself"),
        ({"qqqqq": 1}, "has no argument 'qqqqq'; It takes momentum, dampening"),
    ],
)
def test_an_argument_is_checked_by_name(args: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(Component("SGD", args), **OPTIM)


def test_an_argument_that_is_missing_is_named_with_its_flag() -> None:
    with pytest.raises(ConfigError, match=r"StepLR needs the argument 'step_size'; give --schedule.step_size VALUE"):
        resolve(Component("torch.optim.lr_scheduler.StepLR"), flag="--schedule", provided=("optimizer",))


def test_a_value_that_the_component_refuses_is_told_with_its_place() -> None:
    found = resolve(Component("SGD", {"momentum": -1}), **OPTIM)
    with pytest.raises(
        ConfigError,
        match=r"--optimizer torch.optim.SGD\(momentum=-1\) failed: ValueError: Invalid "
        r"momentum value: -1.*sgd.py:\d+",
    ):
        found(weights(), lr=0.1)


def test_a_module_of_the_users_that_fails_is_told_with_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "their_broken.py").write_text("x = 1\nraise RuntimeError('no licence')\n")
    (tmp_path / "their_import.py").write_text("import package_that_is_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"importing 'their_broken' failed: RuntimeError: no licence .*broken.py:2\)"):
        resolve(Component("their_broken:Model"), flag="--model")
    with pytest.raises(ConfigError, match=r"importing 'their_import' failed: .*'package_that_is_not_there'"):
        resolve(Component("their_import.Model"), flag="--model")


def test_a_missing_torchvision_is_told_with_the_command_that_installs_it(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['torchvision'] = None\n"
        "from hvdtrain.settings.components import resolve; from hvdtrain.settings.options import Component\n"
        "resolve(Component('torchvision.models.resnet18'), flag='--model')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert "--model needs torchvision, which is not installed; pip install 'hvdtrain[vision]'" in done.stderr


def test_a_torchvision_of_another_torch_is_told_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "torchvision").mkdir()
    text = "raise RuntimeError('operator torchvision::nms does not exist')\n"  # what the real one does beside torch+cpu
    (tmp_path / "torchvision" / "__init__.py").write_text(text)
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from hvdtrain.settings.components import resolve; from hvdtrain.settings.options import Component\n"
        "resolve(Component('torchvision.models.resnet18'), flag='--model')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert "operator torchvision::nms does not exist" in done.stderr
    assert "This torchvision belongs to another build of torch; install the two from the same index" in done.stderr


def test_a_callable_that_takes_any_argument_gets_them_all() -> None:
    found = resolve(Component("dict", {"a": 1}), where=({"dict": lambda **kwargs: kwargs},), flag="--task")
    assert found(b=2) == {"a": 1, "b": 2}
