"""One rank of Horovod's own tests of its PyTorch part, with `hvdtrain.horovod` in the place of `horovod.torch`.

    mpirun -np 2 python their_rank.py test_torch.py FOLDER NAME...

Each test's outcome is a line of FOLDER/RANK.jsonl. A test that fails ends all ranks, because the others may wait in it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
import tempfile
import traceback
import types
import unittest
import warnings
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from their_tests import tell_outcomes

# With HVDTRAIN_BACKEND=horovod it is the real Horovod that they meet.
RANK = os.environ.get("OMPI_COMM_WORLD_RANK") or os.environ["RANK"]
SIZE = os.environ.get("OMPI_COMM_WORLD_SIZE") or os.environ["WORLD_SIZE"]


def helpers() -> types.ModuleType:
    """What their tests take from their ``test/utils/common.py``, which needs packages that are not installed here."""

    @contextlib.contextmanager
    def temppath() -> Iterator[str]:
        with tempfile.TemporaryDirectory() as folder:
            yield str(Path(folder) / "file")

    def skip_or_fail_gpu_test(test: unittest.TestCase, message: str) -> None:
        test.skipTest(message)

    made = types.ModuleType("common")
    made.mpi_env_rank_and_size = lambda: (int(RANK), int(SIZE))
    made.skip_or_fail_gpu_test, made.temppath = skip_or_fail_gpu_test, temppath
    return made


def tests(file: Path) -> type[unittest.TestCase]:
    import hvdtrain.horovod

    package = types.ModuleType("horovod")
    package.torch = hvdtrain.horovod
    if os.environ["HVDTRAIN_BACKEND"] != "horovod":
        sys.modules |= {"horovod": package, "horovod.torch": hvdtrain.horovod}
    sys.modules["common"] = helpers()
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (found,) = (one for one in vars(module).values() if isinstance(one, type) and issubclass(one, unittest.TestCase))
    return found


def main() -> None:
    file, folder, names = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    warnings.simplefilter("ignore")
    theirs = tests(file)
    import hvdtrain.horovod as hvd

    def outcome(name: str) -> tuple[str, str]:
        case = theirs(name)
        try:
            method = getattr(case, name)
            if getattr(method, "__unittest_skip__", False):
                return "inapplicable", method.__unittest_skip_why__ or "they skip it"
            marks = getattr(method, "pytestmark", [])
            if any(mark.name == "skip" for mark in marks):
                return "inapplicable", f"they skip it: {marks[0].kwargs.get('reason', '')}"
            method()
            case.tearDown()
        except unittest.SkipTest as error:
            return "inapplicable", str(error)
        except BaseException as error:
            traceback.print_exc()
            return "failing", f"{type(error).__name__}: {error}"
        return "passing", ""

    def together() -> None:
        hvd.init()
        hvd.barrier()

    tell_outcomes(folder / f"{RANK}.jsonl", names, outcome, before=together)
    hvd.init()
    hvd.shutdown()


if __name__ == "__main__":
    main()
