"""One self-contained page out of figures, tables and texts, and the values that it shows as JSON beside it.

A ``Section`` has parts: ``Facts``, ``Figure``, ``Table`` and ``Text``. ``write_page`` writes ``NAME.html`` and
``NAME.json``. Every text is taken for hostile: it is rid of control characters and escaped where it stands, and the
page's Content-Security-Policy runs the page's own script alone and asks no network for anything.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import html
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from conf.console import printable
from conf.output import write_text
from report.bundle import vega
from report.charts import Cell, Row, Spec
from report.look import SCRIPT, STYLE

LARGEST_PAGE = 2_000_000
"""Bytes of a page."""
MOST_ROWS = (1000, 300, 100, 20)
"""Of a table that a page shows, the most for which it is not too large; its JSON has all of them."""
LONGEST_LINE = 4000
"""Characters of one line of text."""
FORMULA = ("=", "+", "-", "@", "\t")
"""What a formula begins with in a spreadsheet."""


@dataclass(frozen=True)
class Facts:
    """A few figures at a glance: label -> value."""

    values: Mapping[str, Cell]


@dataclass(frozen=True)
class Figure:
    """A chart, and its data as a table that can be opened.

    ``chart`` is a Vega-Lite specification (``report.charts``) or an Altair chart, ``alt`` says in words what it shows,
    and ``rows`` are all of its data under the names that readers see.
    """

    title: str
    alt: str
    chart: Any
    rows: Sequence[Row]


@dataclass(frozen=True)
class Table:
    """Rows of cells, as many as there are columns."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]


@dataclass(frozen=True)
class Text:
    """Paragraphs, an empty line between two; or, as ``code``, what is shown as it is written."""

    text: str
    code: bool = False


Part = Facts | Figure | Table | Text


@dataclass(frozen=True)
class Section:
    """A heading and its parts, shut until it is opened if ``closed``. Figures are for open ones."""

    title: str
    parts: Sequence[Part]
    closed: bool = False


def write_page(path: Path, title: str, lead: str, sections: Sequence[Section], made_with: Mapping[str, str]) -> None:
    """Writes the page, and its values as JSON under the same name, each whole or not at all.

    Args:
        path: ends in ``.html``; the JSON's name ends in ``.json`` instead.
        title: of the page.
        lead: what it comes to, in a sentence or a few.
        sections: in their order.
        made_with: versions, commit and date.

    Raises:
        OutputError: a file cannot be written.
        ValueError: the page would be larger than ``LARGEST_PAGE``.
    """
    page = page_of(title, lead, sections, made_with)
    write_text(page, path)
    content = values_of(title, lead, sections, made_with)
    write_text(json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n", path.with_suffix(".json"))


def write_csv(table: Table, path: Path) -> None:
    """One table for a spreadsheet, which takes none of its texts for a formula. Raises OutputError: it cannot be
    written."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    for row in (table.columns, *table.rows):
        cells = [_plain(cell) for cell in row]
        writer.writerow([f"'{cell}" if isinstance(cell, str) and cell[:1] in FORMULA else cell for cell in cells])
    write_text(text.getvalue(), path)


def values_of(title: str, lead: str, sections: Sequence[Section], made_with: Mapping[str, str]) -> dict[str, Any]:
    """What a page shows, as plain JSON: the very values, before they are rounded for the eye."""
    return {
        "title": _plain(title),
        "lead": _plain(lead),
        "sections": [{"title": _plain(one.title), "parts": [_values(part) for part in one.parts]} for one in sections],
        "made_with": {_plain(key): _plain(value) for key, value in made_with.items()},
    }


def _values(part: Part) -> dict[str, Any]:
    if isinstance(part, Facts):
        return {"kind": "facts", "values": {_plain(key): _plain(value) for key, value in part.values.items()}}
    if isinstance(part, Text):
        return {"kind": "text", "text": _plain(part.text)}
    columns = [_plain(column) for column in _columns(part)]
    rows = [[_plain(cell) for cell in row] for row in _cells(part)]
    named = {"title": _plain(part.title), "columns": columns, "rows": rows}
    if isinstance(part, Figure):
        return {"kind": "figure", "alt": _plain(part.alt), **named}
    return {"kind": "table", **named}


def page_of(title: str, lead: str, sections: Sequence[Section], made_with: Mapping[str, str]) -> str:
    """The page. Raises ValueError: it would be too large, whatever is left out of its tables."""
    for most_rows in MOST_ROWS:
        page = _Page(most_rows).whole(title, lead, sections, made_with)
        if (size := len(page.encode())) <= LARGEST_PAGE:
            return page
    raise ValueError(f"the page {printable(title, 60)!r} comes to {size:,} bytes: give its charts fewer rows")


class _Page:
    """One page that is being written."""

    def __init__(self, most_rows: int) -> None:
        self._most_rows = most_rows
        self._charts: dict[str, Spec] = {}
        self._num_parts = 0

    def whole(self, title: str, lead: str, sections: Sequence[Section], made_with: Mapping[str, str]) -> str:
        body = "".join(self._section(number, section) for number, section in enumerate(sections))
        links = "".join(
            f'<li><a href="#section-{number}">{_escaped(section.title)}</a></li>'
            for number, section in enumerate(sections)
        )
        scripts = [vega(), SCRIPT] if self._charts else [SCRIPT]
        return PAGE.format(
            policy=POLICY.format(" ".join(map(_digest, scripts))),
            title=_escaped(title),
            style=STYLE,
            lead="".join(f"<p class=lead>{_escaped(text)}</p>" for text in _paragraphs(lead)),
            links=links,
            body=body,
            made_with=_escaped(", ".join(f"{key} {value}" for key, value in made_with.items())),
            charts=_inside_script(self._charts),
            scripts="".join(f"<script>{script}</script>\n" for script in scripts),
        )

    def _section(self, number: int, section: Section) -> str:
        if section.closed and any(isinstance(part, Figure) for part in section.parts):
            raise ValueError(f"section {section.title!r} is shut, and a figure in it would have no width")
        parts, title = "".join(map(self._part, section.parts)), _escaped(section.title)
        if section.closed:
            parts = f"<details><summary>Show: {title}</summary>{parts}</details>"
        return f'<section aria-labelledby="section-{number}"><h2 id="section-{number}">{title}</h2>{parts}</section>\n'

    def _part(self, part: Part) -> str:
        self._num_parts += 1
        if isinstance(part, Facts):
            facts = (
                f"<div><dt>{_escaped(key)}</dt><dd>{_cell(value)}</dd></div>" for key, value in part.values.items()
            )
            return f"<dl class=facts>{''.join(facts)}</dl>\n"
        if isinstance(part, Text):
            if part.code:
                return f'<pre tabindex="0">{_escaped(part.text)}</pre>\n'
            return "".join(f"<p>{_escaped(text)}</p>" for text in _paragraphs(part.text))
        if isinstance(part, Figure):
            return self._figure(part)
        return self._table(part, f"<caption>{_escaped(part.title)}</caption>")

    def _figure(self, figure: Figure) -> str:
        number = self._num_parts
        spec = figure.chart if isinstance(figure.chart, dict) else figure.chart.to_dict(validate=False)
        self._charts[f"chart-{number}"] = {key: value for key, value in spec.items() if key != "$schema"}
        return (
            f'<figure aria-labelledby="title-{number}"><figcaption id="title-{number}">{_escaped(figure.title)}'
            f'</figcaption><div class=chart role=img id="chart-{number}" aria-label="{_escaped(figure.alt)}"></div>'
            f"<p class=note>{_escaped(figure.alt)}</p><details><summary>The values of this figure "
            f"({len(figure.rows):,})</summary>{self._table(figure)}</details></figure>\n"
        )

    def _table(self, part: Figure | Table, caption: str = "") -> str:
        columns, rows = _columns(part), list(islice(_cells(part), self._most_rows))
        numbers = [all(_is_number(row[i]) or row[i] is None for row in rows) for i in range(len(columns))]
        kinds = [" class=number" if number else "" for number in numbers]
        head = "".join(
            f'<th scope="col"{kind}>{_escaped(name)}</th>' for name, kind in zip(columns, kinds, strict=True)
        )
        body = "".join(
            "<tr>" + "".join(f"<td{kind}>{_cell(cell)}</td>" for cell, kind in zip(row, kinds, strict=True)) + "</tr>"
            for row in rows
        )
        left = len(part.rows) - len(rows)
        more = f"<p class=note>{left:,} more rows are in the page's JSON file.</p>" if left else ""
        return (
            f'<div class=wide tabindex="0" role=region aria-label="{_escaped(part.title)}"><table>{caption}'
            f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{more}\n"
        )


def _columns(part: Figure | Table) -> list[str]:
    if isinstance(part, Table):
        return list(part.columns)
    return list(dict.fromkeys(key for row in part.rows for key in row))


def _cells(part: Figure | Table) -> Iterator[Sequence[Cell]]:
    if isinstance(part, Table):
        return iter(part.rows)
    columns = _columns(part)
    return ([row.get(column) for column in columns] for row in part.rows)


def shown(value: Cell) -> str:
    """A value as a page shows it: four digits of a fraction, thousands apart."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if 1000 <= abs(value) < 1e15 else f"{value:#.4g}".rstrip(".")
    return str(_plain(value))


def _cell(value: Cell) -> str:
    """A number with its exact value beside what is shown of it."""
    if _is_number(value):
        return f'<data value="{json.dumps(value)}">{shown(value)}</data>'
    return _escaped(shown(value))


def _is_number(value: Cell) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _plain(value: Cell) -> Any:
    """For JSON, which has no infinity; of a text what can be seen of it."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, str):
        return "\n".join(printable(line, LONGEST_LINE) for line in value.split("\n"))
    return value


def _escaped(text: str) -> str:
    return html.escape(str(_plain(text)))


def _paragraphs(text: str) -> list[str]:
    return [one for one in text.split("\n\n") if one.strip()]


def _inside_script(content: Any) -> str:
    """JSON that ends no element of a page, and opens none: its own escapes stand for the characters that could."""
    text = json.dumps(_finite(content), allow_nan=False)  # ASCII alone
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _finite(content: Any) -> Any:
    if isinstance(content, float) and not math.isfinite(content):
        return None
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_finite(value) for value in content]
    return content


def _digest(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


POLICY = (
    "default-src 'none'; script-src {}; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
)
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,"><title>{title}</title>
<style>{style}</style></head><body>
<header><div class=head><h1>{title}</h1><button type="button" id="theme" hidden></button></div>
{lead}<nav aria-label="Sections"><ul>{links}</ul></nav></header>
<main>
{body}</main>
<footer><p>Made with {made_with}</p></footer>
<noscript><p>Figures need JavaScript; their values are in the tables.</p></noscript>
<script type="application/json" id="charts">{charts}</script>
{scripts}</body></html>
"""
