"""A second Horovod beside ours, and the real one's variables."""

import json
import sys
from types import ModuleType

import pytest
import torch
from launching import run

import hvdtrain.horovod as hvd
from hvdtrain.errors import ConfigError
from hvdtrain.horovod.surroundings import refuse_the_real


def there_is(*, initialised=False, in_script=False):
    real = ModuleType("horovod.torch")
    real.__file__, real.is_initialized = "/site/horovod/torch/__init__.py", lambda: initialised
    real.init = lambda: None
    main = ModuleType("__main__")
    if in_script:
        main.hvd = real
    return {"horovod.torch": real, "__main__": main}


@pytest.mark.parametrize(
    ("how", "said"), [({"initialised": True}, "was initialised beside"), ({"in_script": True}, "this script imports")]
)
def test_a_real_horovod_in_use_beside_ours_is_refused(how, said):
    with pytest.raises(ConfigError, match=rf"{said}.*python -m hvdtrain.horovod SCRIPT"):
        refuse_the_real(there_is(**how), hvd.is_initialized)


def test_one_that_a_library_has_loaded_is_said(caplog):
    refuse_the_real(there_is(), hvd.is_initialized)
    assert "/site/horovod/torch/__init__.py) is imported too" in caplog.text
    caplog.clear()
    for modules in ({"__main__": sys}, {**there_is(in_script=True), "horovod.torch": hvd, "hvdtrain.horovod": hvd}):
        refuse_the_real(modules, hvd.is_initialized)
        assert not caplog.text


BESIDE = """
{first}
import hvdtrain.horovod as ours
ours.init()
import horovod.torch as real
try:
    real.init()
except Exception as error:
    print(type(error).__name__, error)
ours.shutdown()
real.init()
print("afterwards", real.size())
"""


@pytest.mark.parametrize(
    "first", ["", "__import__('importlib').import_module('horovod.torch')"], ids=["later", "before"]
)
def test_a_real_horovod_does_not_begin_beside_a_job_of_ours(first):
    pytest.importorskip("horovod.torch")
    ended = run([sys.executable, "-c", BESIDE.format(first=first)], HVDTRAIN_BACKEND="local")
    assert "ConfigError the real Horovod" in ended.output, ended.output
    assert "would begin beside hvdtrain.horovod" in ended.output
    assert "afterwards 1" in ended.output


@pytest.fixture
def alone(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "HVDTRAIN_BACKEND"):
        monkeypatch.delenv(name, raising=False)


def test_the_timeline_variable_begins_a_trace_that_ends_with_the_job(alone, monkeypatch, tmp_path):
    file = tmp_path / "trace.json"
    monkeypatch.setenv("HOROVOD_TIMELINE", str(file))
    monkeypatch.setenv("HOROVOD_TIMELINE_MARK_CYCLES", "1")
    for _ in range(2):
        hvd.init()
        hvd.allreduce(torch.ones(1), name="mine")
        hvd.shutdown()
        names = [event["name"] for event in json.loads(file.read_text())]
        assert {"CYCLE_START", "NEGOTIATE_ALLREDUCE", "ALLREDUCE"} <= set(names)


def test_variables_without_effect_are_named_once(alone, monkeypatch, caplog):
    monkeypatch.setenv("HOROVOD_FUSION_THRESHOLD", "0")
    monkeypatch.setenv("HOROVOD_CYCLE_TIME", "5")
    monkeypatch.setenv("HOROVOD_TIMELINE", "DYNAMIC")
    hvd.init()
    hvd.shutdown()
    assert caplog.text.count("HOROVOD_FUSION_THRESHOLD, HOROVOD_CYCLE_TIME: no effect on this engine") == 1
