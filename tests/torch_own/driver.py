"""Run all of them under mpirun, past failures, and sum up: ``python driver.py RANKS OUT.json [NAME...]``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from launching import ENVIRONMENT, mpirun

HERE = Path(__file__).parent
_SILENT_S = 90.0


def names() -> list[str]:
    os.environ.update(BACKEND="gloo", WORLD_SIZE="2", TEMP_DIR=tempfile.gettempdir())
    from torch.testing._internal.distributed import distributed_test as theirs

    return sorted(name for name in dir(theirs.DistributedTest._DistTestBase) if name.startswith("test_"))


def lines(folder: Path) -> list[dict[str, str]]:
    return [json.loads(line) for file in sorted(folder.glob("*.jsonl")) for line in file.read_text().splitlines()]


def once(ranks: int, wanted: list[str], folder: Path) -> dict[str, dict[str, str]]:
    """Run until the end or the first failure; what became of each test that was begun."""
    (folder / "temporary" / "barrier").mkdir(parents=True)
    (folder / "temporary" / "test_dir").mkdir()
    said = (folder / "output").open("wb")
    process = subprocess.Popen(
        mpirun(ranks, str(HERE / "rank.py"), str(folder), *wanted),
        env={**os.environ, **ENVIRONMENT}, stdout=said, stderr=said, start_new_session=True,
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
            found.setdefault(
                line["begun"], {"outcome": "failing", "why": "it ended without an outcome, or did not end"}
            )
    order = {"passing": 0, "inapplicable": 1, "failing": 2}
    for line in lines(folder):
        if "name" in line:
            before = found[line["name"]]
            if before["why"].startswith("it ended") or order[line["outcome"]] > order[before["outcome"]]:
                found[line["name"]] = {"outcome": line["outcome"], "why": line["why"]}
    return found


def run(ranks: int, wanted: list[str]) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    while wanted:
        with tempfile.TemporaryDirectory() as folder:
            became = once(ranks, wanted, Path(folder))
        # One rank may have begun a test when another failed in the one before: that one is begun again.
        first = next((name for name in wanted if name in became), "")
        found |= {n: one for n, one in became.items() if n == first or not one["why"].startswith("it ended")}
        left = [name for name in wanted if name not in found]
        if len(left) == len(wanted):
            raise RuntimeError("no test could be begun")
        wanted = left
    return found


def main() -> None:
    ranks, out, *wanted = sys.argv[1:]
    found = run(int(ranks), wanted or names())
    Path(out).write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    for kind in ("passing", "inapplicable", "failing"):
        print(kind, sum(one["outcome"] == kind for one in found.values()))


if __name__ == "__main__":
    main()
