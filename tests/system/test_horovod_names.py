"""Every public name of the installed horovod.torch is here, with the same arguments in the same order."""

from __future__ import annotations

import pytest
from launching import LOCAL, missing, run

CODE = """
import inspect
import horovod.torch as theirs
import hvdtrain.horovod as ours

inside = {"check_extension", "mpi_lib_v2", "mpi_ops"}
names = [name for name in dir(theirs) if not name.startswith("_") and name not in inside]
lacking = [name for name in names if not hasattr(ours, name)]
assert not lacking, lacking
compared = 0
for name in names:
    function = getattr(theirs, name)
    if inspect.isfunction(function) and name not in ("init", "shutdown"):  # which are *args, **kwargs there
        signatures = [list(inspect.signature(each).parameters) for each in (function, getattr(ours, name))]
        assert signatures[0] == signatures[1], (name, signatures)
        compared += 1
for name in ("Average", "Sum", "Adasum", "Min", "Max", "Product"):
    assert getattr(theirs, name) == getattr(ours, name)
assert compared > 30, compared
"""


@pytest.mark.slow
def test_every_name_is_here_with_the_same_arguments():
    if missing("python", "horovod"):
        pytest.skip(missing("python", "horovod"))
    ended = run(LOCAL.argv(1, "-c", CODE))
    assert ended.code == 0, ended.output
