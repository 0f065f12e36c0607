"""Pages whose programs and commands are run as a reader would: in order, in an empty folder, with the outputs that the page shows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from launching import missing, run
from pages import PAGES, ROOT, blocks, pattern_of

# torchrun's own port is one for the machine; each of these finds a free one.
TORCHRUN = {"PET_RDZV_BACKEND": "c10d", "PET_RDZV_ENDPOINT": "localhost:0"}
FOLLOWED = [
    "tutorial", "concepts", "moving", "moving_from_ddp", "moving_from_accelerate", "moving_from_fabric", "moving_from_ignite",
]  # fmt: skip
NEEDS = {"horovodrun": ("horovodrun-gloo", "horovod"), "mpirun": ("mpirun", "mpi")}


def reasons(command: str) -> str:
    """Why a command cannot be tried here; "" if it can."""
    return missing(*NEEDS[command.split(maxsplit=1)[0]]) if command.split(maxsplit=1)[0] in NEEDS else ""


def follow(page: Path, folder: Path) -> int:
    """Do what a page says; return how many commands were run."""
    ran = 0
    output: str | None = None
    for block in blocks(page.read_text()):
        where = f"{page.name}:{block.line}"
        if block.language == "python" and block.title:
            (folder / block.title).write_text(block.text)
        elif block.language == "sh":
            output = ""
            for command in block.text.replace("\\\n", " ").splitlines():
                if reasons(command):
                    output = None
                    continue
                ended = run(["bash", "-c", command], cwd=folder, **TORCHRUN)
                assert ended.code == 0, f"{where}: {command}\n{ended.output}"
                output, ran = output + ended.output, ran + 1
        elif block.language == "text" and output is not None:
            assert pattern_of(block.text).fullmatch(output), (
                f"{where}: the page shows\n{block.text}and the output is\n{output}"
            )
            output = None
    return ran


@pytest.mark.slow
@pytest.mark.parametrize("page", FOLLOWED)
def test_a_page_can_be_followed(tmp_path, page):
    assert follow(ROOT / "docs" / f"{page}.md", tmp_path) > 0


def test_every_page_with_programs_is_followed():
    with_programs = {page.stem for page in PAGES if any(block.title for block in blocks(page.read_text()))}
    assert with_programs == set(FOLLOWED)


@pytest.mark.parametrize(
    ("page", "message"),
    [
        ("```sh\nexit 3\n```\n", "page.md:1: exit 3"),
        ("```sh\necho loss 2 up\n```\n\n```text\nloss 1 down\n```\n", "page.md:5: the page shows"),
        (
            '```python title="a.py"\nprint(7)\n```\n```sh\npython a.py\n```\n```text\nx\n```\n',
            "page.md:7: the page shows",
        ),
    ],
)
def test_a_page_that_is_wrong_is_found(tmp_path, page, message):
    file = tmp_path / "page.md"
    file.write_text(page)
    with pytest.raises(AssertionError, match=re.escape(message)):
        follow(file, tmp_path)


def test_numbers_may_differ_and_words_not():
    assert pattern_of("...\nloss 0.25 of 3\n").fullmatch("before\nloss 0.1 of 12\n")
    assert not pattern_of("loss 0.25\n").fullmatch("loss nan\n")
    assert not pattern_of("loss 0.25\n").fullmatch("loss 0.25\nand more\n")
