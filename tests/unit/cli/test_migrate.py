"""``hvdtrain migrate`` as users call it: what is printed where, what is written, and exit codes."""

from __future__ import annotations

import io
import os
import subprocess
import sys

import pytest

from hvdtrain.cli.commands import main

SCRIPT = "import horovod.torch as hvd\n\nhvd.init()\nprint(hvd.rank())\n"
MOVED = "import hvdtrain.horovod as hvd\n\nhvd.init()\nprint(hvd.rank())\n"


@pytest.fixture
def script(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "train.py"
    file.write_text(SCRIPT)
    return file


def test_the_diff_is_what_patch_takes_and_nothing_is_written(script, capsys):
    assert main(["migrate", "train.py"]) == 0
    out, err = capsys.readouterr()
    assert (script.read_text(), err) == (SCRIPT, "")
    assert out.startswith("--- a/train.py\n+++ b/train.py\n@@")
    subprocess.run(["patch", "-p1"], input=out, text=True, check=True, capture_output=True)
    assert script.read_text() == MOVED


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a name.py", SCRIPT.encode()),
        ("latin.py", b"# coding: latin-1\n# caf\xe9\n" + SCRIPT.encode()),
        ("mark.py", b"\xef\xbb\xbf" + SCRIPT.encode()),
        ("feed.py", b"x = 1\n\x0c\n" + SCRIPT.encode() + b"\x0c\n"),
        ("separator.py", SCRIPT.encode() + "s = 'a\u2028b\x85c\x1cd'".encode()),
        ("windows.py", SCRIPT.replace("\n", "\r\n").encode()),
    ],
)
def test_patch_makes_of_the_diff_what_write_writes(script, capfdbinary, name, content):
    script.with_name(name).write_bytes(content)
    assert main(["migrate", name]) == 0
    diff = capfdbinary.readouterr().out
    script.with_name("written.py").write_bytes(content)
    assert main(["migrate", "--write", "written.py"]) == 0
    done = subprocess.run(["patch", "-p1", "--binary", "--fuzz=0"], input=diff, check=False, capture_output=True)
    assert done.returncode == 0, done.stdout
    assert script.with_name(name).read_bytes() == script.with_name("written.py").read_bytes() != content


def test_a_diff_needs_no_encoding_of_the_terminal(script, monkeypatch):
    script.write_text(f"# caf\u00e9\n{SCRIPT}")
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    assert main(["migrate", "train.py"]) == 0
    assert " # caf\u00e9\n".encode() in terminal.buffer.getvalue()


def test_a_read_only_file_is_left_as_it_is(script, capsys):
    script.chmod(0o444)
    assert main(["migrate", "--write", "train.py"]) == 2
    assert "train.py cannot be written: it is read-only; chmod u+w train.py" in capsys.readouterr().err
    assert (script.read_text(), [file.name for file in script.parent.iterdir()]) == (SCRIPT, ["train.py"])


def test_write_changes_the_file_and_keeps_its_permissions_and_a_link(script, capsys):
    script.chmod(0o750)
    link = script.with_name("link.py")
    link.symlink_to(script.name)
    assert main(["migrate", "--write", "link.py"]) == 0
    assert capsys.readouterr() == ("", "link.py: written\n")
    assert (link.is_symlink(), script.read_text(), script.stat().st_mode & 0o777) == (True, MOVED, 0o750)
    assert main(["migrate", "--write", "train.py"]) == 0
    assert "nothing to change: it imports hvdtrain" in capsys.readouterr().err
    assert sorted(file.name for file in script.parent.iterdir()) == ["link.py", "train.py"]


def test_what_is_left_is_on_the_standard_error_with_line_and_page_and_the_code_is_1(script, capsys):
    script.write_text("import horovod.torch as hvd\nimport horovod.tensorflow as tf\n")
    assert main(["migrate", "train.py"]) == 1
    out, err = capsys.readouterr()
    assert err.startswith(
        "train.py:2: yours: horovod.tensorflow: hvdtrain is for PyTorch, and has nothing for TensorFlow"
    )
    assert err.endswith(" (docs/migrate.md)\n")
    assert "+import hvdtrain.horovod as hvd" in out


def test_a_loop_that_is_not_whole_is_not_written(script, capsys):
    script.write_text(SCRIPT + "hvd.alltoall(x)\n")
    assert main(["migrate", "--own-loop", "--write", "train.py"]) == 1
    assert "not written, because lines are left for you" in capsys.readouterr().err
    assert script.read_text() == SCRIPT + "hvd.alltoall(x)\n"


def test_a_folder_is_searched_for_scripts_that_name_horovod(script, capsys):
    (script.parent / "deep").mkdir()
    (script.parent / "deep" / "other.py").write_text(SCRIPT)
    (script.parent / "plain.py").write_text("import os\n")
    assert main(["migrate", "--write", "."]) == 0
    assert capsys.readouterr().err == "deep/other.py: written\ntrain.py: written\n"


def test_what_is_installed_in_an_environment_of_a_folder_is_not_touched(script, capsys):
    installed = script.parent / "env" / "lib" / "python3.12" / "site-packages" / "horovod" / "__init__.py"
    installed.parent.mkdir(parents=True)
    installed.write_text(SCRIPT)
    assert main(["migrate", "--write", "."]) == 0
    assert (capsys.readouterr().err, installed.read_text()) == ("train.py: written\n", SCRIPT)


@pytest.mark.parametrize(
    ("name", "content", "word"),
    [
        ("gone.py", None, "cannot be read: No such file"),
        ("bad.py", b"def f(:\n", "bad.py:1: no Python that can be read"),
        ("two.py", b"print 'horovod'\n", "two.py:1: no Python"),
        ("binary.py", b"\x7fELF\0\0", "is a binary file"),
        ("latin.py", b"# caf\xe9\nimport horovod.torch\n", "no text in the encoding"),
        ("odd.py", b"# coding: klingon\n", "no text in the encoding"),
        ("mac.py", b"import horovod\rhorovod.init()\r", "would not keep its bytes"),
        ("book.ipynb", b"{}", "jupyter nbconvert"),
        ("huge.py", b"#" * 6_000_000, "which is no script"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_and_the_others_are_done(script, capsys, name, content, word):
    if content is not None:
        (script.parent / name).write_bytes(content)
    assert main(["migrate", name, "train.py"]) == 2
    out, err = capsys.readouterr()
    assert word in err
    assert "+import hvdtrain.horovod as hvd" in out


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read and write everything")
def test_a_file_that_may_not_be_read_is_named(script, capsys):
    script.chmod(0)
    assert main(["migrate", "train.py"]) == 2
    assert "train.py cannot be read: Permission denied" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "word"),
    [
        ([], "migrate needs a script"),
        (["--own-lop", "train.py"], "did you mean '--own-loop'"),
        (["empty"], "no .py file in this folder names horovod"),
    ],
)
def test_wrong_words_are_named(script, capsys, words, word):
    (script.parent / "empty").mkdir()
    assert main(["migrate", *words]) == 2
    assert word in capsys.readouterr().err


def test_other_line_ends_and_encodings_stay(script):
    script.write_bytes(b"# coding: latin-1\r\nimport horovod.torch as hvd  # caf\xe9\r\n")
    assert main(["migrate", "--write", "train.py"]) == 0
    assert script.read_bytes() == b"# coding: latin-1\r\nimport hvdtrain.horovod as hvd  # caf\xe9\r\n"


def test_help_loads_neither_libcst_nor_torch():
    code = (
        "import sys; from hvdtrain.cli import main; main(['migrate', '--help']); print(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"libcst", "torch"} & set(done.stderr.split())
    assert max(map(len, done.stdout.splitlines())) <= 80
