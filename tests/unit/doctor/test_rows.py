"""Rows: an inspection that fails is one, and JSON brings back what was found."""

from __future__ import annotations

import pytest

from hvdtrain.doctor.rows import NOTE, OK, WRONG, Section, as_json, collected, parsed, text

SECTION = Section("hands")


def half():
    yield SECTION.ok("left", "five fingers")
    raise OSError("the lamp went out")


def whole():
    yield SECTION.note("right", "five\n fingers", "count again")


def test_an_inspection_that_fails_keeps_what_it_had_found_and_stops_nobody():
    rows = list(collected([("hands", half), ("more", whole)]))
    assert [(row.section, row.what, row.verdict) for row in rows] == [
        ("hands", "left", OK),
        ("hands", "inspection", WRONG),
        ("hands", "right", NOTE),
    ]
    assert "OSError: the lamp went out" in rows[1].found
    assert rows[2].found == "five fingers"  # a row is a line


def test_people_read_verdict_finding_and_remedy_and_a_count():
    lines = text([SECTION.ok("left", 5), SECTION.wrong("right", 4, "look for the thumb")]).splitlines()
    assert lines[0] == "hands"
    assert lines[1].startswith("  left ")
    assert lines[2].startswith("! right ")
    assert lines[3].split() == ["->", "look", "for", "the", "thumb"]
    assert lines[-1] == "1 of 2 rows are wrong"
    assert text([SECTION.ok("left", 5)]).endswith("all 1 rows are well")


def test_json_comes_back_as_it_was():
    rows = list(whole())
    assert parsed(as_json(rows)) == rows


@pytest.mark.parametrize("said", ["", "[{}]", "[1]", '[{"section": "a", "colour": "red"}]', "no JSON"])
def test_what_is_no_report_is_refused(said):
    with pytest.raises(ValueError, match=r"Expecting|no rows"):
        parsed(said)


def test_what_a_terminal_would_obey_is_not_passed_on():
    assert Section("x").wrong("y", "\033[2J red\0\n", "\a").found == "?[2J red?"
