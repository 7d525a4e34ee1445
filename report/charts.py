"""Charts out of plain rows: Vega-Lite specifications, made with Altair.

A row is a mapping from column to cell; which columns a chart shows is said by their names, and these, with their units,
are its axis titles. A series has a colour, a dash and a shape of its own, so that no chart is read by colour alone.
Colours of texts, axes and grids are the page's (``report/page.css``), for light, dark and paper.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

Cell = str | int | float | bool | None
Row = Mapping[str, Cell]
Spec = dict[str, Any]
"""Of Vega-Lite, as JSON."""

COLOURS = ("#2f7ed8", "#d45a00", "#00936b", "#a65bc0", "#a67c00", "#008ba3", "#b0569a", "#7d7d7d")
"""Apart for the colour-blind (after Okabe and Ito), and at least 3 : 1 on the light page as on the dark one."""
DASHES = ([1, 0], [7, 3], [2, 2], [9, 3, 2, 3], [4, 4], [12, 3], [1, 3])
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-right")
"""Seven of each: with eight colours 56 series are told apart."""
SHADES = ("#c6dcf5", "#2f7ed8", "#0b2f5c")
"""From little to much."""
HEIGHT = 260
"""Pixels of a plot; its width is the page's."""
STEP = 22
"""Pixels of a bar, or of a line of fields."""
LONGEST_NAME = 60
"""Characters of a series that a legend shows."""


def lines(
    rows: Sequence[Row],
    x: str,
    y: str,
    series: str | None = None,
    *,
    band: tuple[str, str] | None = None,
    log_x: bool = False,
    log_y: bool = False,
) -> Spec:
    """``y`` over ``x``, one line a series, a mark on every value.

    Args:
        rows: in any order; those without a finite ``x`` or ``y`` are not drawn.
        x, y, series: columns; ``x`` and ``y`` hold numbers.
        band: columns of a lower and an upper end, drawn as a band around the line, such as the spread over seeds.
        log_x, log_y: whether the axis is logarithmic; what is not above zero is not drawn then.
    """
    import altair as alt

    low, high = band or (None, None)
    chart = alt.Chart()
    encodings = _axes(x, y, log_x, log_y) | _of_series(rows, series)
    told = _told(rows, {"x": x, "y": y, "series": series, "low": low, "high": high})
    parts: list[Any] = [chart.mark_line(strokeWidth=2).encode(**encodings | _dashes(rows, series))]
    if band is not None:
        ends = {"y": _axis("low", y, log_y), "y2": alt.Y2("high")}
        parts.insert(0, chart.mark_area(opacity=0.2).encode(**encodings | ends))
    parts.append(
        chart.mark_point(filled=True, size=45, opacity=1).encode(**encodings | _shapes(rows, series), tooltip=told)
    )
    data = _data(rows, {"x": x, "y": y, "series": series, "low": low, "high": high}, log_x, log_y)
    return _spec(alt.layer(*parts), data)


def points(
    rows: Sequence[Row],
    x: str,
    y: str,
    series: str | None = None,
    *,
    log_x: bool = False,
    log_y: bool = False,
    front: str | None = None,
) -> Spec:
    """One mark a row.

    Args:
        rows: as of ``lines``.
        x, y, series: as of ``lines``.
        log_x, log_y: as of ``lines``.
        front: a column that is true for the rows which a dashed line connects, such as those of a Pareto front.
    """
    import altair as alt

    chart = alt.Chart()
    encodings = _axes(x, y, log_x, log_y)
    told = _told(rows, {"x": x, "y": y, "series": series})
    marks = chart.mark_point(filled=True, size=90, opacity=1)
    parts: list[Any] = [marks.encode(**encodings | _of_series(rows, series) | _shapes(rows, series), tooltip=told)]
    if front is not None:
        line = chart.transform_filter(alt.FieldEqualPredicate(field="front", equal=True))
        parts.insert(0, line.mark_line(strokeDash=[5, 4], strokeWidth=1.5, color=COLOURS[-1]).encode(**encodings))
    return _spec(alt.layer(*parts), _data(rows, {"x": x, "y": y, "series": series, "front": front}, log_x, log_y))


def bars(rows: Sequence[Row], name: str, value: str, series: str | None = None) -> Spec:
    """One horizontal bar for each ``name``, in the order of the rows; of several ``series`` one after the other.

    Args:
        rows: a name and a number each.
        name, value, series: columns.
    """
    import altair as alt

    order = list(dict.fromkeys(_text(row.get(name)) for row in rows))
    of_series = _of_series(rows, series)
    drawn = (
        alt.Chart()
        .mark_bar(**({} if series is not None else {"color": COLOURS[0]}))
        .encode(
            y=alt.Y("name:N", sort=order, title=name, axis=alt.Axis(labelLimit=160)),
            x=alt.X("y:Q", title=value, axis=_ticks()),
            tooltip=_told(rows, {"name": name, "series": series, "y": value}),
            **{key: of_series[key] for key in ("color",) if key in of_series},
        )
    )
    data = _data(rows, {"name": name, "y": value, "series": series}, texts=("name", "series"))
    return _spec(drawn, data, STEP * len(order))


def histogram(rows: Sequence[Row], x: str, series: str | None = None, *, bins: int = 30) -> Spec:
    """How many rows have which ``x``; of several ``series`` one on another.

    Args:
        rows: a number each, and the series that it is of.
        x, series: columns.
        bins: at most so many.
    """
    import altair as alt

    of_series = _of_series(rows, series)
    drawn = (
        alt.Chart()
        .mark_bar(**({} if series is not None else {"color": COLOURS[0]}))
        .encode(
            x=alt.X("x:Q", bin=alt.Bin(maxbins=bins), title=x),
            y=alt.Y("count():Q", title="how many"),
            tooltip=[
                alt.Tooltip("x:Q", bin=alt.Bin(maxbins=bins), title=x),
                alt.Tooltip("count():Q", title="how many"),
            ],
            **{key: of_series[key] for key in ("color",) if key in of_series},
        )
    )
    return _spec(drawn, _data(rows, {"x": x, "series": series}))


def heat_map(rows: Sequence[Row], x: str, y: str, value: str) -> Spec:
    """A field for each ``x`` and ``y``: whole numbers in their order, texts in that of the rows.

    Args:
        rows: of every field that is not empty one.
        x, y: columns, of which each value is a column or a line of fields.
        value: a column. Numbers are shades, from little to much; texts are marks, each with a colour and a shape.
    """
    import altair as alt

    across, down = (_places(rows, key) for key in (x, y))
    texts = any(isinstance(row.get(value), str) for row in rows)
    name = "series" if texts else "value"
    chart, data = alt.Chart(), _data(rows, {"x": x, "y": y, name: value}, texts=("x", "y", "series"))
    places = {
        "x": alt.X("x:N", sort=across, title=x, axis=alt.Axis(labelAngle=0, labelOverlap=True)),
        "y": alt.Y("y:N", sort=down, title=y, axis=alt.Axis(labelOverlap=True, labelLimit=120)),
        "tooltip": _told(rows, {"x": x, "y": y, name: value}),
    }
    few = len(down) <= 30
    height = (STEP if few else STEP / 2) * len(down)
    if texts:
        marks = chart.mark_point(filled=True, size=110 if few else 45, opacity=1)
        return _spec(marks.encode(**places | _of_series(rows, value) | _shapes(rows, value)), data, height)
    legend = alt.Legend(orient="bottom", title=value, gradientLength=200)
    shade = alt.Color("value:Q", scale=alt.Scale(range=list(SHADES)), legend=legend)
    return _spec(chart.mark_rect().encode(color=shade, **places), data, height)


def _data(
    rows: Sequence[Row],
    columns: Mapping[str, str | None],
    log_x: bool = False,
    log_y: bool = False,
    texts: Sequence[str] = ("series",),
) -> list[Row]:
    """Under names of ours: a column's own might be taken for a path into an object."""
    known = {name: column for name, column in columns.items() if column is not None}
    values: list[Row] = []
    for row in rows:
        one = {name: row.get(column) for name, column in known.items()}
        numbers = {name: one[name] for name in ("x", "y", "value", "low", "high") if name in one and name not in texts}
        least = {"x": 0.0 if log_x else -math.inf, "y": 0.0 if log_y else -math.inf}
        if all(_drawn(number, least.get(name, -math.inf)) for name, number in numbers.items()):
            values.append({name: _text(cell) if name in texts else cell for name, cell in one.items()})
    return values


def _places(rows: Sequence[Row], column: str) -> list[str]:
    values = list(dict.fromkeys(row.get(column) for row in rows))
    numbers = [value for value in values if isinstance(value, int)]
    return [*map(_text, sorted(numbers) if len(numbers) == len(values) else values)]


def _drawn(number: Cell, least: float) -> bool:
    return not isinstance(number, (str, type(None))) and math.isfinite(number) and number > least


def _text(cell: Cell) -> str:
    text = "" if cell is None else str(cell)
    return text if len(text) <= LONGEST_NAME else text[: LONGEST_NAME - 4] + " ..."


def _axes(x: str, y: str, log_x: bool, log_y: bool) -> dict[str, Any]:
    import altair as alt

    scale = alt.Scale(type="log", nice=False) if log_x else alt.Scale(zero=False, nice=False)
    across = alt.X("x:Q", title=x, scale=scale, axis=_ticks(), sort=None)
    return {"x": across, "y": _axis("y", y, log_y)}


def _axis(name: str, title: str, log: bool) -> Any:
    import altair as alt

    return alt.Y(f"{name}:Q", title=title, scale=alt.Scale(type="log") if log else alt.Scale(zero=False), axis=_ticks())


def _ticks() -> Any:
    import altair as alt

    return alt.Axis(format="~s", labelOverlap=True, tickCount=6)


def _names(rows: Sequence[Row], series: str | None) -> list[str]:
    return list(dict.fromkeys(_text(row.get(series)) for row in rows)) if series is not None else []


def _of_series(rows: Sequence[Row], series: str | None) -> dict[str, Any]:
    import altair as alt

    names = _names(rows, series)
    if not names:
        return {"color": alt.value(COLOURS[0])}
    scale = alt.Scale(domain=names, range=_taken(COLOURS, len(names)))
    return {"color": alt.Color("series:N", scale=scale, legend=_legend(), title=None)}


def _dashes(rows: Sequence[Row], series: str | None) -> dict[str, Any]:
    import altair as alt

    names = _names(rows, series)
    scale = alt.Scale(domain=names, range=_taken(DASHES, len(names)))
    return {"strokeDash": alt.StrokeDash("series:N", scale=scale, legend=_legend(), title=None)} if names else {}


def _shapes(rows: Sequence[Row], series: str | None) -> dict[str, Any]:
    import altair as alt

    names = _names(rows, series)
    scale = alt.Scale(domain=names, range=_taken(SHAPES, len(names)))
    return {"shape": alt.Shape("series:N", scale=scale, legend=_legend(), title=None)} if names else {}


def _legend() -> Any:
    import altair as alt

    return alt.Legend(orient="bottom", columns=1, labelLimit=320, symbolStrokeWidth=0, symbolSize=70, symbolOpacity=1)


def _taken(palette: Sequence[Any], count: int) -> list[Any]:
    """So many of a palette, again from its start where it is through."""
    return [palette[number % len(palette)] for number in range(count)]


def _told(rows: Sequence[Row], columns: Mapping[str, str | None]) -> list[Any]:
    """What a mark says when it is pointed at."""
    import altair as alt

    told = []
    for name, column in columns.items():
        if column is not None:
            number = name not in ("series", "name") and all(not isinstance(row.get(column), str) for row in rows)
            whole = all(isinstance(row.get(column), int) for row in rows)
            kind = {"type": "quantitative", "format": ",d" if whole else ",.4~f"} if number else {"type": "nominal"}
            told.append(alt.Tooltip(field=name, title=column, **kind))
    return told


def _spec(chart: Any, data: Sequence[Row], height: float = HEIGHT) -> Spec:
    """As plain JSON, as wide as its place. The data come in here: Altair would copy them again and again."""
    fit = {"type": "fit-x", "contains": "padding"}
    spec: Spec = chart.properties(width="container", height=height, autosize=fit).to_dict(validate=False)
    spec.pop("$schema", None)  # an address, that a page without a network has no use for
    spec.pop("config", None)  # the page's
    for layer in spec.get("layer", []):
        layer.pop("data", None)  # the name of none
    return spec | {"data": {"values": data}}
