"""Every figure that README and docs quote is in a committed JSON file, at the precision that it is quoted at.

A passage says where its figures are from, in a comment that the site does not show:

    <!-- figures: bench/results/both-ways-toy.json bench/results/fidelity-embedded.json#rows.*.snr_db:error -->

It reaches to the next such comment or heading; ``figures of this page:`` holds for all of a page that has no other.
``<!-- figures: none -->`` ends it, before numbers that were not measured: settings, versions, definitions.

``FILE#path`` narrows a source to a part of the file, ``*`` standing for every key or entry; ``a~b|c~d`` is the ratio of
two differences. ``:mean`` takes the mean of all that is there, ``:percent`` a hundred times it, ``:inverse`` one over
it, and ``:error`` turns decibels into error energy over energy. Checked is every number with a decimal point that is
neither code nor a link: rounded to as many digits, some number of the sources must be equal, numbers within names and
texts among them, in the unit that stands behind the number (%, KB, MB, GB, ms, s, minutes). ``1/38.8`` is the number
38.8.

``bench/results/recorded.json`` has what was measured once and is in no other file: page by page, with the commit that
wrote it there. It is a record and no proof.

Every such number must lie in a passage that says so.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *ROOT.glob("examples/*/README.md"), *ROOT.glob("docs/**/*.md")])
MARK = re.compile(r"<!-- figures: (.*?) -->", re.DOTALL)
OF_PAGE = re.compile(r"<!-- figures of this page: (.*?) -->", re.DOTALL)
HEADING = re.compile(r"^#{1,6} ", re.MULTILINE)
NUMBER = re.compile(r"(?<![\w.])(\d[\d,]*\.\d+)(?!\.?\w)(\s?(?:%|KB|MB|GB|ms\b|s\b|minutes\b))?")
UNITS = {
    "": (1.0,),
    "%": (100.0, 1.0),
    "KB": (1e-3,),
    "MB": (1e-6,),
    "GB": (1e-9,),
    "ms": (1e3, 1.0),
    "s": (1.0, 1e-3),
    "minutes": (1 / 60, 1.0),
}
"""What a number of a source is multiplied by."""


@dataclass(frozen=True)
class Passage:
    """What one comment covers; without sources it holds no figures."""

    page: str
    line: int
    sources: tuple[str, ...]
    text: str

    @property
    def name(self) -> str:
        return f"{self.page}:{self.line}"


def readable(text: str) -> str:
    """Without code, links and what stands in other comments; as long as it was, so that places stay."""

    def blank(match: re.Match[str]) -> str:
        return re.sub(r"[^\n]", " ", match[0])

    text = re.sub(r"^```.*?^```", blank, text, flags=re.DOTALL | re.MULTILINE)
    for pattern in (
        r"`[^`]*`",
        r"\]\([^)]*\)",
        r"arXiv[: ]\S+",
        r"(Python|Flower|flwr) \d\.\d+( to \d\.\d+)?",
        r"Apache-2\.0",
        r"<!-- .*? -->",
    ):
        text = re.sub(pattern, blank, text)
    return text


def passages(page: Path) -> list[Passage]:
    """All of a page, cut at its comments and headings."""
    raw = page.read_text(encoding="utf-8")
    text = readable(raw)
    of_page = OF_PAGE.search(raw)
    default = of_page[1].split() if of_page is not None else []
    cuts = sorted({0, len(raw), *(m.start() for m in MARK.finditer(raw)), *(m.start() for m in HEADING.finditer(text))})
    found = []
    for start, end in pairwise(cuts):
        mark = MARK.match(raw, start)
        said = mark[1].split() if mark is not None else default
        body = text[mark.end() if mark is not None else start : end]
        line = raw.count("\n", 0, start) + 1
        found.append(Passage(str(page.relative_to(ROOT)), line, tuple(said), body))
    return found


ALL = [passage for page in PAGES for passage in passages(page)]
COVERED = [passage for passage in ALL if passage.sources not in ((), ("none",))]


def figures(text: str) -> Iterator[tuple[str, str]]:
    """(number, unit) of each."""
    for match in NUMBER.finditer(text):
        yield match[1].replace(",", ""), (match[2] or "").strip()


@cache
def values_of(source: str) -> tuple[float, ...]:
    """All numbers of a source, of names and texts as well; each once."""
    place, _, rest = source.replace(".json:", ".json#:").partition("#")
    path, *ways = rest.split(":")
    top, _, bottom = path.partition("|")
    files = sorted(ROOT.glob(place))
    assert files, f"{place}: there is no such file"
    contents = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    found = difference(contents, top)
    if bottom:
        found = [a / b for a, b in zip(found, difference(contents, bottom), strict=True)]
    assert found, f"{source} holds no numbers"
    for way in ways:
        found = WAYS[way](found)
    return tuple(set(found))


def difference(contents: list[Any], text: str) -> list[float]:
    """Numbers of a path, or of one less those of another behind ``~``, pair by pair."""
    first, *others = (
        [
            value
            for content in contents
            for part in parts_of(content, path.split(".") if path else [])
            for value in numbers_in(part)
        ]
        for path in text.split("~")
    )
    return [a - sum(rest) for a, *rest in zip(first, *others, strict=True)] if others else first


WAYS: dict[str, Callable[[list[float]], list[float]]] = {
    "error": lambda values: [10 ** (-value / 10) for value in values],
    "inverse": lambda values: [1 / value for value in values if value],
    "mean": lambda values: [mean(values)],
    "percent": lambda values: [100 * value for value in values],
}
"""How a figure comes from a source's numbers, where it is none of them."""


def parts_of(content: Any, path: list[str]) -> Iterator[Any]:
    if not path:
        yield content
        return
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        if fnmatch(str(key), path[0]):
            yield from parts_of(value, path[1:])


def numbers_in(content: Any) -> Iterator[float]:
    if isinstance(content, dict):
        for key, value in content.items():
            yield from numbers_in(str(key))
            yield from numbers_in(value)
    elif isinstance(content, list):
        for value in content:
            yield from numbers_in(value)
    elif isinstance(content, str):
        yield from map(float, re.findall(r"\d+(?:\.\d+)?", content))
    elif isinstance(content, (int, float)) and not isinstance(content, bool):
        yield float(content)


def is_in(number: str, unit: str, sources: tuple[str, ...]) -> bool:
    digits = len(number.partition(".")[2])
    half = 0.5000001 * 10.0**-digits
    wanted = float(number)
    return any(
        abs(abs(value) * scale - wanted) <= half
        for source in sources
        for scale in UNITS[unit]
        for value in values_of(source)
    )


@pytest.mark.parametrize("passage", COVERED, ids=[passage.name for passage in COVERED])
def test_every_figure_of_a_passage_is_in_the_files_that_it_names(passage: Passage) -> None:
    missing = [number + unit for number, unit in figures(passage.text) if not is_in(number, unit, passage.sources)]
    assert not missing, f"{passage.name}: not in {', '.join(passage.sources)}: {', '.join(missing)}"


@pytest.mark.parametrize("page", sorted({passage.page for passage in ALL}))
def test_every_figure_of_a_page_lies_in_such_a_passage(page: str) -> None:
    found = [number for one in ALL if one.page == page and not one.sources for number, _ in figures(one.text)]
    assert not found, (
        f"{page}: say where {', '.join(found[:20])} are from (<!-- figures: FILE -->), or that they are none"
    )


RECORDED = json.loads((ROOT / "bench/results/recorded.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", [key for key in RECORDED if key != "about"])
def test_every_recorded_figure_is_quoted_on_its_page(page: str) -> None:
    text = (ROOT / f"{page}.md").read_text(encoding="utf-8")
    quoted = [float(number) / scale for number, unit in figures(readable(text)) for scale in UNITS[unit]]
    said = {value for entry in RECORDED[page].values() for value in entry["figures"]}
    assert all(re.fullmatch("[0-9a-f]{10}", entry["commit"]) for entry in RECORDED[page].values())
    lost = [value for value in said if not any(abs(value - here) <= 1e-6 * here for here in quoted)]
    assert not lost, f"{page} does not quote {lost}"


def test_a_wrong_figure_is_noticed() -> None:
    """Of all covered figures with another last digit, most are in none of their files."""
    wrong = [
        (f"{number[:-1]}{(int(number[-1]) + 3) % 10}", unit, passage.sources)
        for passage in COVERED
        for number, unit in figures(passage.text)
    ]
    noticed = [not is_in(number, unit, sources) for number, unit, sources in wrong]
    assert len(noticed) > 50 and sum(noticed) > 0.5 * len(noticed), f"{sum(noticed)} of {len(noticed)}"


def test_numbers_are_read_in_their_units(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "kept 87.8 % (1/38.8), 12.3 KB in 4.5 minutes, `0.1`, flwr 1.39, 1.39.0, [x](x-0.3.md), v0.4, 1,234.5 s"
    assert [*figures(readable(text))] == [
        ("87.8", "%"),
        ("38.8", ""),
        ("12.3", "KB"),
        ("4.5", "minutes"),
        ("1234.5", "s"),
    ]
    content = {"kept": 0.8784, "a run of 38.8": [12_340, {"db": 3.0103}], "yes": True}
    (tmp_path / "x.json").write_text(json.dumps(content))
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    values_of.cache_clear()
    assert is_in("87.8", "%", ("x.json",)) and is_in("38.8", "", ("x.json",)) and is_in("12.3", "KB", ("x.json",))
    assert not is_in("87.9", "%", ("x.json",)) and not is_in("12.3", "", ("x.json",))
    assert is_in("0.500", "", ("x.json#a*.1.db:error",)) and not is_in("0.500", "", ("x.json",))
    assert is_in("0.292", "", ("x.json#kept|a*.1.db",)) and not is_in("0.293", "", ("x.json#kept|a*.1.db",))
    assert is_in("0.708", "", ("x.json#a*.1.db~kept|a*.1.db:mean",))
    with pytest.raises(AssertionError, match="no such file"):
        is_in("1.0", "", ("y.json",))
    values_of.cache_clear()
