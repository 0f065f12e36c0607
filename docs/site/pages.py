"""What the site has beside docs/: pages made of files elsewhere in the repository that some page links to.

Pages are written for a plain viewer of the repository, with relative links to files (``../examples/gan.py``). mkdocs knows the
files of docs/ alone; this hook adds a page for every other file that is linked to, and turns the links to it. README.md is the
front page.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
FIRST = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"]  # pages of the site, whether linked to or not
LANGUAGES = {
    ".py": "python",
    ".sh": "sh",
    ".yaml": "yaml",
    ".yml": "yaml",
    ".toml": "toml",
    ".cfg": "ini",
    ".json": "json",
}
LINK = re.compile(r"(\]\()([^)#\s]+)(#[^)\s]*)?(\))")
OTHER_SITE = re.compile(r"[a-z]+:")


def on_files(files: Files, config: Any, **_: Any) -> Files:
    """Add the pages that are made."""
    for path in sorted(made()):
        files.append(File.generated(config, place(path), content=content(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links to files of the repository into links to their pages."""
    source = home(page.file.src_uri)
    if source is None:
        return markdown

    def turned(match: re.Match[str]) -> str:
        opening, target, anchor, closing = match.groups(default="")
        path = linked(source, target)
        if path is None:
            return match[0]
        return f"{opening}{posixpath.relpath(place(path), posixpath.dirname(page.file.src_uri))}{anchor}{closing}"

    return LINK.sub(turned, markdown)


def made() -> set[str]:
    """The files and folders outside docs/ that have a page, by their path in the repository."""
    found: set[str] = set()
    waiting = [*FIRST, *(file.relative_to(ROOT).as_posix() for file in DOCS.rglob("*.md"))]
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        if not path.startswith("docs/"):
            found.add(path)
        for match in LINK.finditer(content(path)):
            target = linked(path, match[2])
            if target is not None and not target.startswith("docs/"):
                waiting.append(target)
    return found


def linked(source: str, target: str) -> str | None:
    """The file or folder of the repository that a link leads to; None for another site, or for nothing that is here."""
    if OTHER_SITE.match(target):
        return None
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
    return path if (ROOT / path).exists() else None


def place(path: str) -> str:
    """Where in the site the page of a file is."""
    if path == "README.md":
        return "index.md"
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if (ROOT / path).is_dir():
        return f"source/{path}/index.md"
    return f"source/{path}" if path.endswith(".md") else f"source/{path}.md"


def home(place_in_site: str) -> str | None:
    """The file that a page was made of, or is."""
    for path in made():
        if place(path) == place_in_site:
            return path
    return f"docs/{place_in_site}" if (DOCS / place_in_site).is_file() else None


def content(path: str) -> str:
    """The page of a file: its text, in a frame if it is no page by itself; of a folder: what is in it."""
    file = ROOT / path
    if file.is_dir():
        inside = sorted(entry.name for entry in file.iterdir() if not entry.name.startswith(("_", ".")))
        return f"# {path}\n\n" + "\n".join(f"- [{name}]({path.rpartition('/')[2]}/{name})" for name in inside) + "\n"
    text = file.read_text()
    if file.suffix == ".md":
        return text
    return f"# {path}\n\n````{LANGUAGES.get(file.suffix, 'text')}\n{text.rstrip()}\n````\n"
