"""Text that nobody should write is refused by one sentence, within a second: in files, in flags, in components."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hvdtrain.cli.commands import main
from hvdtrain.errors import BackendUnavailable, ConfigError
from hvdtrain.settings.config import TrainConfig
from hvdtrain.settings.flags import build, config_text, read_flags
from hvdtrain.settings.options import every_option_of
from hvdtrain.settings.wording import shown

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10)
)
FILES: dict[str, tuple[str | bytes, str]] = {
    "a number of 6,001 digits": (f"epochs: {'9' * 6001}", "too many digits"),
    "such a number in hexadecimal": (f"epochs: 0x{'f' * 6001}", "too many digits"),
    "such a number as an argument": (f"model: {{name: cnn, width: 0x{'f' * 6001}}}", "too many digits"),
    "3,000 brackets": (f"model: {{name: cnn, x: {'[' * 3000}{']' * 3000}}}", "nested too deeply"),
    "3,000 braces": ("{" * 3000, "nested too deeply"),
    "3,000 dashes": ("- " * 3000, "nested too deeply"),
    "3,000 question marks": ("? " * 3000, "nested too deeply"),
    "300 levels by indentation": ("".join(" " * n + "a:\n" for n in range(300)), "nested too deeply"),
    "a billion values by aliases": (BOMB, "more than 50,000 values"),
    "a value inside itself": ("model: {name: cnn, x: &a [*a]}", "inside itself"),
    "a mapping inside itself": ("model: {name: cnn, x: &a {b: *a}}", "inside itself"),
    "a mapping merged into itself": ("model: &a {name: cnn, <<: *a}", "inside itself"),
    "half a character": ('run_dir: "\\ud800"', "half a character"),
    "half a character as a key": ('"\\ud800": 1', "half a character"),
    "a zero byte in a path": ('run_dir: "a\\0b"', "without zero bytes"),
    "bytes that are no text": (b"run_dir: \xff\xfe", "unacceptable character"),
    "a tag that does not fit": ('epochs: !!int "x"', "no int can be made of this"),
    "another": ("epochs: !!bool 3", "no bool can be made of this"),
    "a set": ("epochs: !!set {1}", "could not determine a constructor"),
    "an object": ("epochs: !!python/object/apply:os.system ['true']", "could not determine a constructor"),
    "keys that are lists": ("[epochs]: 1", "unknown key"),
    "a file of 1 MB": ("# " + "x" * 10**6, "larger than 64 KiB"),
    "1e300 epochs": ("epochs: 1e300", "at most 15 digits"),
    "1e300 seconds": ("timeout: 1e300", "--timeout must be at most 2000000"),
    "a very long name": (f"model: {'a.' * 20_000}b", "at most 4096 characters"),
    "more workers than a machine has": ("workers: 10000", "--workers must be at most 1024"),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_refused_by_one_sentence_at_once(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content, message = FILES[name]
    file = tmp_path / "a.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    began = time.monotonic()
    assert main(["--config", str(file), "--print-config"]) == 2
    assert time.monotonic() - began < 3
    said = capsys.readouterr().err
    assert message in said
    assert len(said) < 1500
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model.x", "[" * 3000], "nested too deeply"),
        (["--model.x", "9" * 6001], "too many digits"),
        (["--epochs", "9" * 6001], "must be a finite number"),
        (["--epochs", "²"], "must be a whole number"),
        (["--lr", "1e300"], "--lr must be at most 1000000"),
        (["--run-dir", "\udcff"], "in UTF-8"),
        (["--model", "\udcff"], "in UTF-8"),
        (["--data", "imagefolder:\udcff"], "in UTF-8"),
        (["--model.x", "\udcff"], "unacceptable character"),
        (["--\udcff", "1"], "unknown flag"),
        (["--config", "\udcff"], "cannot read"),
        (["--" + "a" * 100_000, "1"], "unknown flag"),
        (["--device", "cuda:²"], "--device must be"),
        (["--device", "cuda:99999999999999999999"], "--device must be"),
    ],
)
def test_a_command_line_is_refused_by_one_sentence(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*argv, "--print-config"]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert len(said) < 1500
    said.encode("ascii", "backslashreplace")


VALUES = st.one_of(
    st.text(max_size=20),
    st.sampled_from(["1e400", "-0", "nan", ".inf", "0x10", "1_0", "٣", "[1", "{a: b}", "none", "\udcff", "9" * 5000, "&a [*a]", "!!int x"]),
    st.integers().map(str),
    st.floats().map(str),
)  # fmt: skip
FLAGS = st.sampled_from(
    [entry.flag for entry in every_option_of(TrainConfig) if entry.kind is not bool] + ["--model.x", "--data.y"]
)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(FLAGS, VALUES), max_size=4))
def test_any_values_of_flags_are_a_configuration_that_can_be_written_or_a_refusal(pairs: list[tuple[str, str]]) -> None:
    said = ""
    try:
        config_text(build(TrainConfig, read_flags(TrainConfig, [f"{flag}={value}" for flag, value in pairs]))).encode()
    except (ConfigError, BackendUnavailable) as error:
        said = str(error)
    assert len(said) < 1500


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.one_of(
        st.text(max_size=60), st.text(alphabet="[]{}&*!?:-,ab \n\t\"'|>%@#0.1e", max_size=60), st.binary(max_size=40)
    )
)
def test_any_text_of_a_file_is_a_configuration_or_a_refusal(tmp_path: Path, content: str | bytes) -> None:
    file = tmp_path / "any.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    said = ""
    try:
        build(TrainConfig, read_flags(TrainConfig, ["--config", str(file)]))
    except ConfigError as error:
        said = str(error)
    assert len(said) < 1500


def test_what_cannot_be_shown_is_described() -> None:
    class Odd:
        def __repr__(self) -> str:
            raise RuntimeError("planted")

    cyclic: list[object] = []
    cyclic.append(cyclic)
    assert shown(10**5000) == "a number of 5001 digits"
    assert shown(Odd()) == "a Odd"
    assert shown(cyclic) == "[[[[[...]]]]]"
    assert shown("\udcff") == "'\\udcff'"
    assert len(shown({"a": ["x" * 10**6] * 10**6})) <= 160
    for plain in (1, -2.5, "a'b", None, True, [1, "a"], (1,), {"a": [1]}, [], {}, ()):
        assert shown(plain) == repr(plain)
