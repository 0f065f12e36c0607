"""What stands in README and docs/ is there: files and headings that are linked to, programs that parse, names, flags and messages."""

from __future__ import annotations

import ast
import functools
import importlib
import re
from pathlib import Path

import pytest
from pages import PAGES, ROOT, blocks

import hvdtrain
from hvdtrain.settings.config import TrainConfig
from hvdtrain.settings.options import options_of
from hvdtrain.testing.features import exclusions

LINK = re.compile(r"\]\(([^)#\s]*)(#[^)\s]*)?\)")
NAMED = [pytest.param(page, id=page.relative_to(ROOT).as_posix()) for page in PAGES]


def outside_frames(page: Path) -> str:
    text = re.sub(r"^( *)```.*?^\1```$", "", page.read_text(), flags=re.M | re.S)
    return re.sub(r"`[^`\n]*`", "", text)


@functools.cache
def anchors(page: Path) -> set[str]:
    """As both GitHub and the site make them of headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {"#" + re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", NAMED)
def test_links_lead_somewhere(page):
    for target, anchor in LINK.findall(outside_frames(page)):
        if re.match("[a-z]+:", target):
            continue
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), target
        assert not anchor or file.suffix != ".md" or anchor in anchors(file), target + anchor


@pytest.mark.parametrize("page", NAMED)
def test_programs_parse_and_use_public_names(page):
    for block in blocks(page.read_text()):
        if block.language == "python":
            for node in ast.walk(ast.parse(block.text)):
                if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "hvdtrain":
                    assert hasattr(hvdtrain, node.attr) or importlib.import_module(f"hvdtrain.{node.attr}")


def test_flags_that_commands_have_exist():
    known = {entry.flag for entry in options_of(TrainConfig)} | {"--config", "--print-config", "--help"}
    sections = tuple(f"{flag}." for flag in known)
    found = 0
    for page in PAGES:
        for command in re.findall(r"-m hvdtrain((?: [^`#|&\n]+)?)", page.read_text()):
            for flag in re.findall(r"(?<= )(--[\w.-]+)", command):
                found += 1
                positive = f"--{flag.removeprefix('--no-')}"
                assert flag in known or positive in known or flag.startswith(sections), f"{page.name}: {flag}"
    assert found > 5


def told() -> list[str]:
    """Every text in the package, a value's place in it left open."""
    texts = []
    for file in (ROOT / "hvdtrain").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                texts.append("".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return texts


def test_messages_that_troubleshooting_shows_are_what_is_written():
    messages = re.findall(r"^> (.*)$", (ROOT / "docs" / "troubleshooting.md").read_text(), re.M)
    texts = told()
    assert len(messages) > 20
    for message in messages:
        said = r"[^\n]*".join(re.escape(part) for part in message.split("…"))
        assert any(re.search(said, text) for text in texts), message


def test_the_compatibility_page_lists_the_table_of_what_excludes_each_other():
    assert exclusions() in (ROOT / "docs" / "compatibility.md").read_text()
