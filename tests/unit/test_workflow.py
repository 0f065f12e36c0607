"""The workflow of GitHub's calls what there is: targets of the Makefile, and files of tests."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def commands() -> list[str]:
    yaml = pytest.importorskip("yaml", reason="needs PyYAML")
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text())["jobs"]
    return [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]


def test_targets_and_files_exist():
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    called = [word for command in commands() for word in re.findall(r"^make ([a-z-]+)", command)]
    assert set(called) <= set(targets)
    assert {"lint", "test", "test-all", "docs", "dist"} <= set(called)
    for file in re.findall(r"tests/\S+\.py", "\n".join(commands())):
        assert (ROOT / file).is_file(), file


def test_every_python_that_the_package_names_is_tried():
    named = re.findall(r"Python :: (3\.\d+)$", (ROOT / "setup.cfg").read_text(), re.M)
    workflow = (ROOT / ".github" / "workflows" / "tests.yml").read_text()
    assert re.findall(r'"(3\.\d+)"', re.search(r"newest-pytorch:.*?python: (\[.*?\])", workflow, re.S)[1]) == named
