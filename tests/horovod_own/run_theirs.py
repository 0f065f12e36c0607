"""Run Horovod's own PyTorch tests over an engine, past failures: ``python run_theirs.py mpi|torch|horovod RANKS FILE OUT.json [NAME...]``.

The file is Horovod's ``test/parallel/test_torch.py`` or ``test/single/test_torch_elastic.py`` of version 0.28.1; neither is part of this
repository. With ``horovod`` the real one runs them.
"""

from __future__ import annotations

import ast
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from launching import ENVIRONMENT, mpirun, torchrun
from their_tests import Found, once, past_failures, sum_up

HERE = Path(__file__).parent
_SILENT_S = 120.0


def names(file: Path) -> list[str]:
    tree = ast.parse(file.read_text())
    found = [node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    return sorted(name for name in found if name.startswith("test_"))  # unittest's order; some leave things behind


def main() -> None:
    backend, ranks, file, out, *wanted = sys.argv[1:]
    theirs = Path(file).resolve()
    launcher = torchrun if backend == "torch" else mpirun
    environment = {**os.environ, **ENVIRONMENT, "HVDTRAIN_BACKEND": backend, "HVDTRAIN_TIMEOUT_S": "60"}

    def begin(wanted: list[str], folder: Path) -> Found:
        argv = launcher(int(ranks), str(HERE / "their_rank.py"), str(theirs), str(folder), *wanted)
        found, code = once(argv, environment, folder, _SILENT_S)
        if code:
            print((folder / "output").read_text()[-3000:], file=sys.stderr)
        return found

    found = past_failures(begin, wanted or names(theirs))
    # One of them measures time to the millisecond (test_global_barrier_op), which a busy machine does not keep.
    found |= past_failures(begin, [name for name, one in found.items() if one["outcome"] == "failing"])
    sum_up(found, Path(out))


if __name__ == "__main__":
    main()
