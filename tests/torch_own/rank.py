"""One rank of PyTorch's own process-group tests (those inside its wheel) over the mpi4py group.

    mpirun -np 2 python rank.py FOLDER NAME...

Each test's outcome is a line of FOLDER/RANK.jsonl. A test that fails ends all ranks, because the others may wait in it.
"""

from __future__ import annotations

import os
import sys
import traceback
import unittest
import warnings
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from their_tests import tell_outcomes

RANK, SIZE = os.environ["OMPI_COMM_WORLD_RANK"], os.environ["OMPI_COMM_WORLD_SIZE"]


def main() -> None:
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    # By this name their tests choose what a CPU backend can do; the groups that they make are of the default group's kind.
    os.environ.update(BACKEND="gloo", WORLD_SIZE=SIZE, TEMP_DIR=str(folder / "temporary"))
    warnings.simplefilter("ignore")
    import torch
    import torch.distributed as dist

    torch.manual_seed(1234)  # importing their module makes models, which must be the same on every rank
    from torch.testing._internal import common_distributed
    from torch.testing._internal.distributed import distributed_test as theirs

    import hvdtrain.mpi  # noqa: F401

    skips = {skip.exit_code: skip.message for skip in common_distributed.TEST_SKIPS.values()}

    class Ours(theirs.DistributedTest._DistTestBase, theirs.TestDistBackend):
        pass

    def outcome(name: str) -> tuple[str, str]:
        case = Ours(name)
        case.rank = int(RANK)
        case.file_name = str(folder / "temporary" / f"store-{name}")
        theirs.Barrier.sync(
            wait_for=int(SIZE), timeout=60
        )  # over files: a test may leave a barrier of the group half met
        torch.manual_seed(1234)
        try:
            getattr(case, name)()
        except unittest.SkipTest as error:
            return "inapplicable", str(error)
        except SystemExit as error:
            if error.code in skips:
                return "inapplicable", skips[error.code]
            return "failing", f"exit {error.code}"
        except BaseException as error:
            traceback.print_exc()
            return "failing", f"{type(error).__name__}: {error}"
        return "passing", ""

    dist.init_process_group("mpi4py", timeout=timedelta(seconds=40))
    theirs.Barrier.init()
    dist.barrier()

    def end_without_the_group() -> None:
        if not dist.is_initialized() or dist.get_backend() != "mpi4py":  # the test has put another in its place
            os._exit(4)

    tell_outcomes(folder / f"{RANK}.jsonl", names, outcome, after=end_without_the_group)
    theirs.Barrier.sync(wait_for=int(SIZE), timeout=60)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
