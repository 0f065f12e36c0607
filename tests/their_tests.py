"""Another project's own tests, run on ranks past failures, and what became of each.

A rank writes a line when it begins a test and one with its outcome. A test that fails ends all ranks, because the others may
wait in it; the rest are then begun anew.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

Found = dict[str, dict[str, str]]

_ENDED = "it ended without an outcome, or did not end"
_KINDS = ("passing", "inapplicable", "failing")


def nothing() -> None:
    """Do nothing."""


def tell_outcomes(
    log_file: Path,
    names: Sequence[str],
    outcome: Callable[[str], tuple[str, str]],
    *,
    before: Callable[[], None] = nothing,
    after: Callable[[], None] = nothing,
) -> None:
    """On a rank: run tests one after the other, and end the process at the first that fails.

    Args:
        log_file: Of this rank, a ``.jsonl`` in the folder that `once` looks into.
        names: Of the tests.
        outcome: Runs one; "passing", "inapplicable" or "failing", and why.
        before: Called before a test is said to have begun.
        after: Called after one that has not failed.
    """
    with log_file.open("a") as log:
        for name in names:
            before()
            log.write(json.dumps({"begun": name}) + "\n")
            log.flush()
            result, why = outcome(name)
            log.write(json.dumps({"name": name, "outcome": result, "why": why[:600]}) + "\n")
            log.flush()
            if result == "failing":
                os._exit(3)
            after()


def once(argv: Sequence[str], environment: dict[str, str], folder: Path, silent_s: float) -> tuple[Found, int]:
    """Start ranks, and wait until their end or the first failure.

    Args:
        argv: The launcher's words.
        environment: Of the launcher.
        folder: Where ranks write their lines, and where their output goes.
        silent_s: Ranks that write no line for so long are ended.

    Returns:
        What became of each test that was begun, and the launcher's exit code.
    """
    with (folder / "output").open("wb") as said:
        process = subprocess.Popen(argv, env=environment, stdout=said, stderr=said, start_new_session=True)
        seen, last = 0, time.monotonic()
        while process.poll() is None:
            time.sleep(0.2)
            count = len(_lines(folder))
            if count != seen:
                seen, last = count, time.monotonic()
            if time.monotonic() - last > silent_s:
                os.killpg(process.pid, 9)
                process.wait()
    return _became(folder), process.returncode


def past_failures(begin: Callable[[list[str], Path], Found], wanted: list[str]) -> Found:
    """Begin tests, and after a failure those that are left, until something became of all.

    Args:
        begin: Runs some of them in a new folder until the first failure; see `once`.
        wanted: Their names.
    """
    found: Found = {}
    while wanted:
        with tempfile.TemporaryDirectory() as folder:
            became = begin(wanted, Path(folder))
        # One rank may have begun a test when another failed in the one before: that one is begun again.
        first = next((name for name in wanted if name in became), "")
        found |= {name: one for name, one in became.items() if name == first or one["why"] != _ENDED}
        left = [name for name in wanted if name not in found]
        if len(left) == len(wanted):
            raise RuntimeError("no test could be begun")
        wanted = left
    return found


def sum_up(found: Found, out: Path) -> None:
    """Write what became of each, and print how many of each kind there are."""
    out.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    for kind in _KINDS:
        print(kind, sum(one["outcome"] == kind for one in found.values()))


def _lines(folder: Path) -> list[dict[str, str]]:
    return [json.loads(line) for file in sorted(folder.glob("*.jsonl")) for line in file.read_text().splitlines()]


def _became(folder: Path) -> Found:
    """The worst that any rank says of each test that was begun."""
    lines = _lines(folder)
    found: Found = {line["begun"]: {"outcome": "failing", "why": _ENDED} for line in lines if "begun" in line}
    for line in lines:
        if "name" in line:
            before = found[line["name"]]
            if before["why"] == _ENDED or _KINDS.index(line["outcome"]) > _KINDS.index(before["outcome"]):
                found[line["name"]] = {"outcome": line["outcome"], "why": line["why"]}
    return found
