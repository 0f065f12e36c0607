"""docs/horovod.md names every edit and every flag there is, and no other."""

from __future__ import annotations

import re
from pathlib import Path

from hvdtrain.horovod_build.edits import EDITS
from hvdtrain.horovod_build.wishes import Wishes
from hvdtrain.settings.options import options_of

TEXT = (Path(__file__).resolve().parents[3] / "docs" / "horovod.md").read_text()


def section(title: str) -> str:
    return TEXT.partition(f"### {title}\n")[2].partition("\n### ")[0]


def test_every_edit_is_explained_once():
    rows = [line.split("|")[1] for line in section("What is edited, and why").splitlines() if line.startswith("| `")]
    named = re.findall(r"`([^`]+)`", " ".join(rows))
    assert sorted(named) == sorted(edit.name for edit in EDITS)


def test_every_flag_is_in_the_documentation():
    for entry in options_of(Wishes):
        negative = f"--no-{entry.flag[2:]}"
        assert f"`{entry.flag}" in TEXT or f"`{negative}`" in TEXT, entry.flag
