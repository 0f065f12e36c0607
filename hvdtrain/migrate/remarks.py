"""What a migration has to say about a line: what it could not translate, and what it dropped."""

from __future__ import annotations

from dataclasses import dataclass

API_PAGE = "docs/horovod_scripts.md"
OWN_LOOP_PAGE = "docs/training.md"
COLLECTIVES_PAGE = "docs/collectives.md"
THIS_PAGE = "docs/migrate.md"


@dataclass(frozen=True, kw_only=True, slots=True, order=True)
class Remark:
    """One line of a script that wants a look.

    Attributes:
        line: In the script as it was.
        text: What and why, one sentence.
        page: The page that explains it.
        yours: It could not be translated, so that the script does not run before you have seen to it. Otherwise the
            script runs, and what it does not do any more is said.
    """

    line: int
    text: str
    page: str = THIS_PAGE
    yours: bool = True
