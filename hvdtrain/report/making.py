"""From the folders of runs to a page and its pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hvdtrain.errors import ConfigError
from hvdtrain.observe.whole_file import write_whole
from hvdtrain.report.metrics import chosen_metrics
from hvdtrain.report.page import Shown, page
from hvdtrain.report.reading import names_of, read_run

MOST_RUNS = 10
_REMEDY = "choose another --out"


def make_report(folders: Sequence[Path], out: Path | None = None, *, metrics: Sequence[str] | None = None) -> Path:
    """Write ``report.html`` and a PNG for each picture.

    Args:
        folders: Of runs.
        out: The folder to write into; None for ``report`` in the run's folder, or here for several runs.
        metrics: Names of metrics to draw, as `fnmatch` has them; None for the first 24 and a remark on the others.

    Returns:
        The page.

    Raises:
        ConfigError: A folder is no run's, no metric has such a name, matplotlib is missing, or there are too many runs.
        OutputError: It cannot be written.
    """
    distinct = list({_real(folder): folder for folder in folders}.values())
    if len(distinct) > MOST_RUNS:
        raise ConfigError(f"{len(distinct)} runs in one picture cannot be told apart; give at most {MOST_RUNS}")
    runs = [read_run(folder, name) for folder, name in zip(distinct, names_of(distinct), strict=True)]
    try:
        from hvdtrain.report.pictures import pictures  # noqa: PLC0415 - an optional library
    except ImportError as error:
        raise ConfigError(f"hvdtrain report draws with matplotlib ({error}); pip install 'hvdtrain[report]'") from error
    wanted, remark = chosen_metrics(runs, metrics)
    if remark:
        runs[0].remarks.append(remark)
    drawn = pictures(runs, wanted)
    place = out or (distinct[0] / "report" if len(distinct) == 1 else Path("report"))
    shown = [Shown(name=each.name, title=each.title, note=each.note, svg=each.svg) for each in drawn]
    target = place / "report.html"
    for each in drawn:
        write_whole(place / f"{each.name}.png", each.png, remedy=_REMEDY)
    write_whole(target, page(runs, shown), remedy=_REMEDY)
    return target


def _real(folder: Path) -> Path:
    try:
        return folder.resolve()
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle, up to Python 3.12
        raise ConfigError(f"{folder} cannot be found ({error}); give the folder of a run") from error
