"""What the doctor finds: rows, each with a verdict and, where something is wrong, what to do about it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

OK, NOTE, WRONG = "ok", "note", "wrong"
_MARKS = {OK: "  ", NOTE: "- ", WRONG: "! "}
_WIDTH = 17


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One finding.

    Attributes:
        section: What it belongs to: "software", "MPI", ...
        what: What was looked at.
        verdict: `OK`, `NOTE` (nothing is wrong, but good to know) or `WRONG`.
        found: What was found.
        remedy: What to do, where something is wrong.
    """

    section: str
    what: str
    verdict: str
    found: str
    remedy: str = ""


class Section:
    """Makes rows of one section."""

    def __init__(self, name: str) -> None:
        self._name = name

    def ok(self, what: str, found: object) -> Row:
        """As it should be."""
        return self._row(what, OK, found, "")

    def note(self, what: str, found: object, remedy: str = "") -> Row:
        """Nothing is wrong, but somebody may want it otherwise."""
        return self._row(what, NOTE, found, remedy)

    def wrong(self, what: str, found: object, remedy: str) -> Row:
        """Something will not work."""
        return self._row(what, WRONG, found, remedy)

    def _row(self, what: str, verdict: str, found: object, remedy: str) -> Row:
        return Row(section=self._name, what=what, verdict=verdict, found=_line(str(found)), remedy=_line(remedy))


def collected(inspections: Iterable[tuple[str, Callable[[], Iterable[Row]]]]) -> Iterator[Row]:
    """The rows of all inspections; one that fails has said what it had found before, and fails alone."""
    for name, inspect in inspections:
        try:
            yield from inspect()
        except Exception as error:
            yield Section(name).wrong(
                "inspection",
                f"failed itself: {type(error).__name__}: {error}",
                "the rest of this report holds without it",
            )


def text(rows: Sequence[Row]) -> str:
    """For people: a block a section; lines that begin with "!" are wrong."""
    lines: list[str] = []
    section = None
    for row in rows:
        if row.section != section:
            lines += ["", row.section] if lines else [row.section]
            section = row.section
        lines.append(f"{_MARKS[row.verdict]}{row.what:<{_WIDTH}} {row.found}")
        if row.remedy:
            lines.append(f"  {'':<{_WIDTH}} -> {row.remedy}")
    wrong = sum(row.verdict == WRONG for row in rows)
    return "\n".join(
        [*lines, "", f"{wrong} of {len(rows)} rows are wrong" if wrong else f"all {len(rows)} rows are well"]
    )


def as_json(rows: Sequence[Row]) -> str:
    """For programs: a list of objects with the attributes of `Row`."""
    return json.dumps([dataclasses.asdict(row) for row in rows], indent=1)


def parsed(said: str) -> list[Row]:
    """Rows that another doctor printed as JSON.

    Raises:
        ValueError: It is none of that.
    """
    try:
        return [Row(**entry) for entry in json.loads(said)]
    except TypeError as error:
        raise ValueError(f"no rows: {error}") from error


def _line(said: str) -> str:
    """One line, without what a terminal would obey."""
    return "".join(sign if sign.isprintable() else "?" for sign in " ".join(said.split()))
