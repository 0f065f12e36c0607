"""Run all of them under mpirun, past failures, and sum up: ``python driver.py RANKS OUT.json [NAME...]``."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from launching import ENVIRONMENT, mpirun
from their_tests import Found, once, past_failures, sum_up

HERE = Path(__file__).parent
_SILENT_S = 90.0


def names() -> list[str]:
    os.environ.update(BACKEND="gloo", WORLD_SIZE="2", TEMP_DIR=tempfile.gettempdir())
    from torch.testing._internal.distributed import distributed_test as theirs

    return sorted(name for name in dir(theirs.DistributedTest._DistTestBase) if name.startswith("test_"))


def main() -> None:
    ranks, out, *wanted = sys.argv[1:]

    def begin(wanted: list[str], folder: Path) -> Found:
        (folder / "temporary" / "barrier").mkdir(parents=True)
        (folder / "temporary" / "test_dir").mkdir()
        argv = mpirun(int(ranks), str(HERE / "rank.py"), str(folder), *wanted)
        return once(argv, {**os.environ, **ENVIRONMENT}, folder, _SILENT_S)[0]

    sum_up(past_failures(begin, wanted or names()), Path(out))


if __name__ == "__main__":
    main()
