"""YAML by the rules of 1.2, with errors that say where."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvdtrain.errors import ConfigError
from hvdtrain.settings.yaml_text import dump, load_mapping, parse_value


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("10", 10),
        ("010", 10),
        ("-3", -3),
        ("0x1F", 31),
        ("0o17", 15),
        ("1e-3", 1e-3),
        ("1E5", 1e5),
        (".5", 0.5),
        ("-.inf", float("-inf")),
        ("true", True),
        ("no", "no"),
        ("off", "off"),
        ("1:30", "1:30"),
        ("2026-01-31", "2026-01-31"),
        ("null", None),
        ("~", None),
        ("", None),
        ("[1, 2e0, a]", [1, 2.0, "a"]),
        ("{a: 1, b: [2]}", {"a": 1, "b": [2]}),
        ("'10'", "10"),
        ("a.b:C", "a.b:C"),
        ("=", "="),
        ("<<", "<<"),
        ("01:02:03", "01:02:03"),
        ("2026-01-31 10:00:00", "2026-01-31 10:00:00"),
    ],
)
def test_a_value_is_what_yaml_1_2_says(text: str, expected: Any) -> None:
    value = parse_value(text, "--model.x")
    assert value == expected
    assert type(value) is type(expected)


def test_a_broken_value_names_the_flag() -> None:
    with pytest.raises(ConfigError, match=r"--model\.x: cannot read '\[1, 2': "):
        parse_value("[1, 2", "--model.x")


@pytest.mark.parametrize(
    "value",
    ["1e-3", "yes", "no", "true", "null", "~", "010", "0x1F", "1:30", "2026-01-31", "", " a ", "a: b", "# a", "é\n",
     "<<", 1e-3, 1e-5, 1e300, float("inf"), 0, -1, True, None, [1, [2, {"a": "1e3"}]], {"b": {"c": []}}],
)  # fmt: skip
def test_what_is_dumped_is_loaded_equal(tmp_path: Path, value: Any) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(dump({"key": value}), encoding="utf-8")
    loaded = load_mapping(str(file))["key"]
    assert loaded == value
    assert type(loaded) is type(value)


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=("Cs",)))
    | st.from_regex(r"[-+.0-9eExXob_:~<=nyofNYtrue ]{0,8}", fullmatch=True),  # what nearly is another type
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abk1 :#", min_size=1), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None, max_examples=300)
@given(VALUES)
def test_any_plain_value_is_one_line_and_comes_back_equal_with_its_types(value: Any) -> None:
    text = dump({"key": value})
    assert text.count("\n") == 1
    assert repr(parse_value(text, "--x")) == repr({"key": value})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: 1\nb: [1\n", r"a\.yaml, line \d+, column 1: expected ',' or '\]'"),
        (b"a: 1\nb: 2\na: 3\n", r'a\.yaml, line 3, column 1: found duplicate key "a"'),
        (b"model: {n: 1, n: 2}\n", r'line 1, column 15: found duplicate key "n"'),
        (b"- a\n- b\n", r"a\.yaml must hold keys and values such as 'epochs: 3', got a list"),
        (b"epochs 3\n", r"got a str"),
        (b"a: !!python/object/apply:os.system ['true']\n", r"line 1, column 4: could not determine a constructor"),
        (b"a: 1\n---\nb: 2\n", r"line 2, column 1: but found another document"),
        (b"a: \xff\xfe\xfa\n", r"a\.yaml: "),
        (b"a: " + b"[" * 20_000, r"a\.yaml: nested too deeply"),
        (b"a: {n: 1, n: |-\n  two\n  lines}\n", r"a\.yaml, line \d+"),
        (b"n: 1\nn: |-\n  two\n  lines\n", r"line 2, column 1: found duplicate key .n. with value .two lines."),
    ],
)
def test_a_broken_file_is_refused_with_its_place(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "a.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        load_mapping(str(file))
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--config: cannot read '.*gone\.yaml': No such file or directory"):
        load_mapping(str(tmp_path / "gone.yaml"))
    with pytest.raises(ConfigError, match="Is a directory"):
        load_mapping(str(tmp_path))


def test_an_empty_file_is_an_empty_mapping(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("# nothing yet\n")
    assert load_mapping(str(tmp_path / "a.yaml")) == {}


def test_merge_keys_and_anchors_work(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("x: &x {a: 1, b: 2}\ny:\n  <<: *x\n  b: 3\n")
    assert load_mapping(str(tmp_path / "a.yaml"))["y"] == {"a": 1, "b": 3}
