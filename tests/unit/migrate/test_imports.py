"""The first form: every way to import Horovod becomes ours, and the rest of the script stays as it is."""

from __future__ import annotations

import libcst as cst
import pytest

import hvdtrain.horovod
import hvdtrain.horovod.elastic
from hvdtrain.horovod_modules import MODULES, NAMES, OURS
from hvdtrain.migrate.imports import imports_moved


def moved(script: str) -> tuple[str, list[tuple[int, str]]]:
    module, remarks = imports_moved(cst.parse_module(script))
    return module.code, [(remark.line, remark.text) for remark in remarks]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("import horovod.torch as hvd\nhvd.init()\n", "import hvdtrain.horovod as hvd\nhvd.init()\n"),
        ("import horovod.torch\nhorovod.torch.init()\n", "import hvdtrain.horovod\nhvdtrain.horovod.init()\n"),
        ("import horovod\nhorovod.run(f, np=2)\n", "import hvdtrain.horovod\nhvdtrain.horovod.run(f, np=2)\n"),
        ("import horovod as h\nh.run(f)\n", "import hvdtrain.horovod as h\nh.run(f)\n"),
        (
            "import horovod as h, horovod.torch\nh.torch.rank()\n",
            "import hvdtrain.horovod as h, hvdtrain.horovod\nh.rank()\n",
        ),
        ("import os, horovod, horovod.torch\n", "import os, hvdtrain.horovod\n"),
        ("from horovod import torch as hvd\n", "from hvdtrain import horovod as hvd\n"),
        ("from horovod import torch\ntorch.rank()\n", "from hvdtrain import horovod as torch\ntorch.rank()\n"),
        (
            "from horovod import run, torch as t\n",
            "from hvdtrain.horovod import run; from hvdtrain import horovod as t\n",
        ),
        ("from horovod.torch import (rank,\n    size)\n", "from hvdtrain.horovod import (rank,\n    size)\n"),
        ("from horovod.torch import *\n", "from hvdtrain.horovod import *\n"),
        ("from horovod.torch.mpi_ops import allreduce as a\n", "from hvdtrain.horovod import allreduce as a\n"),
        ("from horovod.torch import elastic\n", "from hvdtrain.horovod import elastic\n"),
        ("import horovod.torch.elastic as e\n", "import hvdtrain.horovod.elastic as e\n"),
        ("from horovod.torch.elastic.state import TorchState\n", "from hvdtrain.horovod.elastic import TorchState\n"),
        ("from horovod.common.elastic import ObjectState\n", "from hvdtrain.horovod.elastic import ObjectState\n"),
        (
            "from horovod.common.exceptions import HorovodInternalError\n",
            "from hvdtrain.horovod.elastic import HorovodInternalError\n",
        ),
        (
            "def f():\n    import horovod.torch as hvd  # late\n    return hvd.size()\n",
            "def f():\n    import hvdtrain.horovod as hvd  # late\n    return hvd.size()\n",
        ),
        (
            "try:\n    import horovod.torch as hvd\nexcept ImportError:\n    hvd = None\n",
            "try:\n    import hvdtrain.horovod as hvd\nexcept ImportError:\n    hvd = None\n",
        ),
    ],
)
def test_an_import_becomes_ours(before, after):
    assert moved(before) == (after, [])
    assert moved(after) == (after, [])  # and is then done


@pytest.mark.parametrize(
    "script",
    [
        "import os\n",
        "horovod = 3\nprint(horovod.torch)\n",
        "import hvdtrain.horovod as hvd\r\nhvd.init()\r\n",
        "from . import horovod\n",
        "import horovodish\n",
        "",
    ],
)
def test_what_is_not_horovods_stays(script):
    assert moved(script) == (script, [])


@pytest.mark.parametrize(
    ("script", "word"),
    [
        ("import horovod.tensorflow as hvd", "TensorFlow"),
        ("import horovod.tensorflow.keras as hvd", "TensorFlow"),
        ("from horovod.keras import callbacks", "Keras"),
        ("from horovod import mxnet as hvd", "MXNet"),
        ("import horovod.spark", "Spark"),
        ("from horovod.ray import RayExecutor", "Ray"),
        ("from horovod.common.util import gpu_available", "inner part"),
        ("from horovod.torch import allreduce_sparse", "none of its public names"),
        ("import importlib\nhvd = importlib.import_module('horovod.torch')", "'hvdtrain.horovod'"),
    ],
)
def test_what_cannot_be_translated_is_left_and_named_with_its_line(script, word):
    after, said = moved(f"x = 1\n{script}\n")
    assert "x = 1\n" in after
    assert [line for line, text in said if word in text] == [1 + len(script.splitlines())]


def test_our_modules_have_every_name_that_a_script_is_given():
    homes = {OURS: hvdtrain.horovod, f"{OURS}.elastic": hvdtrain.horovod.elastic}
    assert set(MODULES.values()) == set(homes) == set(NAMES)
    missing = {(home, name) for home, module in homes.items() for name in NAMES[home] if not hasattr(module, name)}
    assert missing == set()


def test_import_star_gives_a_script_every_name_and_none_of_our_modules():
    given: dict[str, object] = {}
    exec("from hvdtrain.horovod import *", given)
    assert {name for name in given if not name.startswith("__")} == NAMES[OURS] | {"is_homogeneous"}
