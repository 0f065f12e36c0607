"""Whose module stands under Horovod's name."""

import pickle
import sys
from types import ModuleType

import pytest

from hvdtrain.errors import LaunchError
from hvdtrain.horovod.importing import STAND_IN, install


@pytest.fixture
def names(monkeypatch):
    """Whatever a test does to the names, the rest of the run has what it had."""
    for name in [name for name in sys.modules if name.split(".")[0] == "horovod"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "horovod"]:
        del sys.modules[name]


def test_a_real_horovod_that_was_imported_before_is_named(names):
    sys.modules["horovod"] = ModuleType("horovod")
    sys.modules["horovod"].__file__ = "/site/horovod/__init__.py"
    with pytest.raises(LaunchError, match=r"the real Horovod \(/site/horovod/__init__.py\) was imported before"):
        install()


def test_the_names_are_ours_once_and_travel_to_other_processes(names):
    install()
    install()
    import horovod.torch as hvd

    import hvdtrain.horovod as ours

    assert hvd.allreduce is ours.allreduce
    assert pickle.loads(pickle.dumps(hvd)) is hvd
    assert (sys.path.count(STAND_IN), sum(type(one).__name__ == "_Finder" for one in sys.meta_path)) == (1, 1)
    assert {"allreduce", "elastic", "run"} <= set(hvd.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'allreduse'"):
        _ = hvd.allreduse


def test_the_stand_in_folder_alone_is_enough_for_a_child(names, monkeypatch):
    monkeypatch.syspath_prepend(STAND_IN)
    import horovod.torch as hvd

    import hvdtrain.horovod as ours

    assert hvd.DistributedOptimizer is ours.DistributedOptimizer


def test_the_version_is_that_of_the_api_under_both_names(names):
    install()
    import horovod

    import hvdtrain.horovod as ours

    assert horovod.__version__ == ours.__version__ == "0.28.1"
