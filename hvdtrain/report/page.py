"""One HTML page that needs nothing else: no file beside it, no network, no script."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hvdtrain.report.reading import Run
from hvdtrain.report.telling import differing, environment, numbers, phases_of, stragglers
from hvdtrain.version import __version__

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, "DejaVu Sans", sans-serif; color: #1b1f24; background: #fff; max-width: 58rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: .2rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; border-bottom: 1px solid #d8dde3; padding-bottom: .2rem; }
p.note { color: #57606a; margin: .2rem 0 .6rem; } ul.remarks { background: #fff8e1; border-left: 4px solid #e69f00; padding: .6rem 1rem .6rem 2rem; }
figure { margin: 0; overflow-x: auto; } svg { width: 100%; height: auto; }
table { border-collapse: collapse; font-size: .9rem; } th, td { text-align: left; padding: .18rem 1.2rem .18rem 0; border-bottom: 1px solid #eceff2; vertical-align: top; overflow-wrap: anywhere; }
th { font-weight: 600; } td { font-variant-numeric: tabular-nums; } tr.differs td, tr.differs th { background: #eef6ff; }
details summary { cursor: pointer; color: #0b5cad; } div.wide { overflow-x: auto; }
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shown:
    """A picture as the page takes it: its heading, a sentence, and an ``<svg>`` element."""

    name: str
    title: str
    note: str
    svg: str


def page(runs: Sequence[Run], pictures: Sequence[Shown]) -> str:
    """Compose the page; all text of the runs is escaped."""
    title = "Run " + runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8">',
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">",
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{_of(title)} - hvdtrain report</title><style>{_STYLE}</style></head><body>",
        f"<h1>{_of(title)}</h1><p class='note'>hvdtrain report {__version__}; "
        + "; ".join(_of(str(run.folder)) for run in runs)
        + "</p>",
        _remarks(runs),
        "<h2 id='numbers'>Numbers</h2>",
        _table({run.name: numbers(run) for run in runs}, mark=False),
    ]
    for picture in pictures:
        parts.append(
            f"<h2 id='{_of(picture.name)}'>{_of(picture.title)}</h2><p class='note'>{_of(picture.note)}</p>"
            f"<figure>{picture.svg}</figure>"
        )
        if picture.name == "phases":
            parts.append(_straggling(runs))
    parts += [
        "<h2 id='configuration'>Configuration</h2>",
        _configuration(runs),
        "<h2 id='environment'>Environment</h2>",
        _table({run.name: environment(run) for run in runs}),
        "</body></html>\n",
    ]
    return "\n".join(parts)


def _remarks(runs: Sequence[Run]) -> str:
    said = [(run.name if len(runs) > 1 else "", remark) for run in runs for remark in run.remarks]
    if not said:
        return ""
    items = "".join(f"<li>{_of(f'{who}: ' if who else '')}{_of(remark)}</li>" for who, remark in said)
    return f"<ul class='remarks'>{items}</ul>"


def _straggling(runs: Sequence[Run]) -> str:
    parts = ["<h2 id='slow_ranks'>Stragglers</h2>"]
    for run in runs:
        phases = phases_of(run, typical=True)
        if phases is not None:
            who = f"{run.name}: " if len(runs) > 1 else ""
            parts += [f"<p>{_of(who)}{_of(' '.join(stragglers(phases)))}</p>"]
    return "\n".join(parts)


def _configuration(runs: Sequence[Run]) -> str:
    tables = {run.name: run.settings for run in runs}
    if len(runs) == 1:
        return _table(tables)
    names = differing([run.settings for run in runs])
    changed = {name: {key: table[key] for key in names if key in table} for name, table in tables.items()}
    first = _table(changed) if names else "<p>The same in all runs.</p>"
    return f"{first}<details><summary>all settings</summary>{_table(tables)}</details>"


def _table(columns: Mapping[str, Mapping[str, str]], *, mark: bool = True) -> str:
    """A row for each name, a column for each run; rows that differ are marked."""
    names = list(dict.fromkeys(name for column in columns.values() for name in column))
    if not names:
        return "<p class='note'>nothing is known of it</p>"
    different = set(differing([dict(column) for column in columns.values()])) if mark and len(columns) > 1 else set()
    head = "" if len(columns) == 1 else f"<tr><th></th>{''.join(f'<th>{_of(name)}</th>' for name in columns)}</tr>"
    rows = "".join(
        f"<tr{' class=differs' if name in different else ''}><th>{_of(name)}</th>"
        + "".join(f"<td>{_of(column.get(name, ''))}</td>" for column in columns.values())
        + "</tr>"
        for name in names
    )
    return f"<div class='wide'><table>{head}{rows}</table></div>"


def _of(text: str) -> str:
    shown = "".join(sign if sign.isprintable() else "?" for sign in text)
    return html.escape(shown.encode("utf-8", "replace").decode())
