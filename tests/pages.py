"""The pages of docs/ and README.md as tests read them: what stands in frames, which commands, which links."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*(ROOT / "docs").rglob("*.md"), *ROOT.glob("*.md")])

_FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*)(?P<rest>[^\n]*)\n(?P<text>.*?)^(?P=indent)```$", re.M | re.S)
_TITLE = re.compile(r'title="([^"]+)"')


@dataclass(frozen=True)
class Block:
    """A frame of a page.

    Attributes:
        language: "python" for a program, "sh" for commands, "text" for what the commands before it write.
        title: The file that a program is, or "".
        text: What is in it.
        line: Where it begins, counted from 1.
    """

    language: str
    title: str
    text: str
    line: int


def blocks(page: str) -> list[Block]:
    """All frames, in the page's order."""
    found = []
    for match in _FENCE.finditer(page):
        title = _TITLE.search(match["rest"])
        text = "".join(line.removeprefix(match["indent"]) for line in match["text"].splitlines(keepends=True))
        found.append(Block(match["language"], title[1] if title else "", text, page.count("\n", 0, match.start()) + 1))
    return found


def pattern_of(expected: str) -> re.Pattern[str]:
    """What output must be to be like ``expected``: the same words, other numbers; a line of three dots is any lines, or none."""
    lines = []
    for line in expected.splitlines():
        if line == "...":
            lines.append(r"(?:.*\n)*?")
        else:
            words = re.sub(r"\d+(\\\.\d+)?", r"\\d+(?:\\.\\d+)?", re.escape(line))
            lines.append(re.sub(r"(\\ )+", r" +", words) + r" *\n")
    return re.compile("".join(lines))
