"""A report of a real run, opened in a real browser without a window."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from hvdtrain.cli import main

pytest.importorskip("matplotlib", reason="hvdtrain[report] is not installed")
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="there is no Chromium here; Debian has it: apt-get install chromium"),
]
HEADINGS = ["Numbers", "Loss", "Accuracy", "Throughput", "Where the time of a step goes", "Stragglers", "Configuration", "Environment"]  # fmt: skip


def opened(page: Path, folder: Path) -> tuple[str, list[str]]:
    """The document as the browser has it after loading, and what it complained of."""
    assert BROWSER is not None
    done = subprocess.run(
        [
            BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", f"--user-data-dir={folder / 'profile'}",
            "--enable-logging=stderr", f"--screenshot={folder / 'seen.png'}", "--dump-dom", "--window-size=1000,3000", page.as_uri(),
        ],
        capture_output=True, text=True, timeout=180, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def test_the_page_opens_in_a_browser_with_its_headings_and_pictures_and_without_a_complaint(tmp_path):
    folder = tmp_path / "run"
    flags = ["--model", "mlp", "--epochs", "2", "--backend", "local", "--device", "cpu", "--log-every", "2"]
    assert main([*flags, "--run-dir", str(folder)]) == 0
    assert main(["report", str(folder)]) == 0
    document, complaints = opened(folder / "report" / "report.html", tmp_path)
    assert complaints == []
    headings = re.findall(r"<h2[^>]*>([^<]*)", document)
    assert [heading for heading in HEADINGS if heading not in headings] == []
    assert document.count("<svg") == len(list((folder / "report").glob("*.png"))) >= 8
    assert not re.search(r"<(script|link|img|iframe)", document)
    assert (tmp_path / "seen.png").stat().st_size > 20_000  # a blank page has a fifth of that


def test_a_script_that_somebody_adds_is_refused_by_the_page_and_the_browser_says_so(tmp_path):
    from hvdtrain.report.page import page
    from hvdtrain.report.reading import Run

    file = tmp_path / "planted.html"
    text = page([Run(name="planted", folder=tmp_path)], [])
    file.write_text(text.replace("</body>", "<script>document.body.innerHTML = 'gone'</script></body>"))
    document, complaints = opened(file, tmp_path)
    assert any("Content Security Policy" in line for line in complaints)
    assert "gone</body>" not in document
