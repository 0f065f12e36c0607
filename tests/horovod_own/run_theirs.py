"""Run Horovod's own PyTorch tests over an engine, past failures: ``python run_theirs.py mpi|torch RANKS test_torch.py OUT.json [NAME...]``.

The file is Horovod's ``test/parallel/test_torch.py`` of version 0.28.1; it is not part of this repository.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from launching import ENVIRONMENT, mpirun, torchrun

HERE = Path(__file__).parent
_SILENT_S = 120.0
_ENDED = "it ended without an outcome, or did not end"


def names(file: Path) -> list[str]:
    tree = ast.parse(file.read_text())
    found = [node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    return sorted(name for name in found if name.startswith("test_"))  # unittest's order; some leave things behind


def lines(folder: Path) -> list[dict[str, str]]:
    return [json.loads(line) for file in sorted(folder.glob("*.jsonl")) for line in file.read_text().splitlines()]


def once(backend: str, ranks: int, file: Path, wanted: list[str], folder: Path) -> dict[str, dict[str, str]]:
    """Run until the end or the first failure; what became of each test that was begun."""
    launcher = mpirun if backend == "mpi" else torchrun
    own = {"HVDTRAIN_BACKEND": backend, "HVDTRAIN_TIMEOUT_S": "60"}
    with (folder / "output").open("wb") as said:
        process = subprocess.Popen(
            launcher(ranks, str(HERE / "their_rank.py"), str(file), str(folder), *wanted),
            env={**os.environ, **ENVIRONMENT, **own}, stdout=said, stderr=said, start_new_session=True,
        )  # fmt: skip
        seen, last = 0, time.monotonic()
        while process.poll() is None:
            time.sleep(0.2)
            count = len(lines(folder))
            if count != seen:
                seen, last = count, time.monotonic()
            if time.monotonic() - last > _SILENT_S:
                os.killpg(process.pid, 9)
                process.wait()
    found: dict[str, dict[str, str]] = {}
    for line in lines(folder):
        if "begun" in line:
            found.setdefault(line["begun"], {"outcome": "failing", "why": _ENDED})
    order = {"passing": 0, "inapplicable": 1, "failing": 2}
    for line in lines(folder):
        if "name" in line:
            before = found[line["name"]]
            if before["why"] == _ENDED or order[line["outcome"]] > order[before["outcome"]]:
                found[line["name"]] = {"outcome": line["outcome"], "why": line["why"]}
    if process.returncode:
        print((folder / "output").read_text()[-3000:], file=sys.stderr)
    return found


def run(backend: str, ranks: int, file: Path, wanted: list[str]) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    while wanted:
        with tempfile.TemporaryDirectory() as folder:
            became = once(backend, ranks, file, wanted, Path(folder))
        # One rank may have begun a test when another failed in the one before: that one is begun again.
        first = next((name for name in wanted if name in became), "")
        found |= {name: one for name, one in became.items() if name == first or one["why"] != _ENDED}
        left = [name for name in wanted if name not in found]
        if len(left) == len(wanted):
            raise RuntimeError("no test could be begun")
        wanted = left
    return found


def main() -> None:
    backend, ranks, file, out, *wanted = sys.argv[1:]
    found = run(backend, int(ranks), Path(file).resolve(), wanted or names(Path(file)))
    # One of them measures time to the millisecond (test_global_barrier_op), which a busy machine does not keep.
    failed = [name for name, one in found.items() if one["outcome"] == "failing"]
    found |= run(backend, int(ranks), Path(file).resolve(), failed)
    Path(out).write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    for kind in ("passing", "inapplicable", "failing"):
        print(kind, sum(one["outcome"] == kind for one in found.values()))


if __name__ == "__main__":
    main()
