"""Which line of what ranks and their launcher have said tells most of a failure. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence

_WHO = re.compile(
    r"^\s*\[(rank)?\d+(,\d+)?\](<std(out|err)>)?:\s?"
)  # what torch and horovodrun put before a rank's lines
_RULE = re.compile(r"[-=]{10,}")
_ERROR = re.compile(r"[\w.]*(Error|Exception|Interrupt|Exit)\b|\w+: error\b|error\b")
_TORCHRUN_ENDS = re.compile(r"torch/distributed/elastic/.* (failed \(exitcode: |Sending process \d+ closing signal)")
_ROOT_CAUSE = "Root Cause (first observed failure):"
_BLOCK = re.compile(
    r"(prterun|mpirun|mpiexec|orterun)\b.* (detected that one or more processes|noticed that process rank)"
)


def telling(lines: Sequence[str]) -> str:
    """A rank's error, or else the last line that a rank said, or else what its launcher says of its end; "" for nothing.

    Args:
        lines: All that was said, by ranks and launchers, in the order in which it came.
    """
    clean = [_WHO.sub("", line).strip(" \t\0") for line in lines]
    clean = [line for line in clean if line and not _RULE.fullmatch(line)]
    said, ended = _parted(clean)
    errors = [line for line in said if _ERROR.match(line)]
    heads = [line for line in said if "rror" in line.partition(":")[0] and not line.startswith("Errorcode")]
    return (errors or heads or ([f"{said[-1]}; {ended}" if said else ended] if ended else said) or [""])[-1]


def _parted(lines: Sequence[str]) -> tuple[list[str], str]:
    """What ranks said, and how a rank ended by what torchrun or mpirun says of it where it ended without a word."""
    begins = next((at for at, line in enumerate(lines) if _TORCHRUN_ENDS.search(line)), None)
    if begins is not None:
        cause = list(lines)[list(lines).index(_ROOT_CAUSE) :] if _ROOT_CAUSE in lines else []
        found = dict(line.partition(":")[::2] for line in cause if ":" in line)
        values = {name.strip(): value.strip() for name, value in found.items()}
        return list(lines[:begins]), _ended(values)
    begins = next((at for at, line in enumerate(lines) if _BLOCK.match(line)), None)
    if begins is None:
        return list(lines), ""
    block = lines[begins:]
    words = " ".join(block[:2])
    signal = re.search(r"process rank (\d+) .*exited on signal \d+ \((.*?)\)", words)
    return list(lines[:begins]), f"rank {signal[1]} was ended by a signal: {signal[2]}" if signal else ""


def _ended(cause: dict[str, str]) -> str:
    rank = cause.get("rank", "?").split(" ")[0]
    code = re.match(r"(-?\d+)(?: \(pid: \d+\))?\s*(?:\((\w+)\))?", cause.get("exitcode", ""))
    if code is None:
        return ""
    return (
        f"rank {rank} was ended by a signal: {code[2] or code[1]}"
        if int(code[1]) < 0
        else f"rank {rank}: exit code {code[1]}"
    )
