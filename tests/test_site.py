"""The documentation's site: it builds without a warning, its links lead somewhere, it loads nothing from elsewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[1]
TEXTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("*/README.md"), *ROOT.glob("docs/**/*.md")])
LOADED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "object": "data", "link": "href"}
"""Elements by which a page loads something, and where they name it."""


@dataclass
class Page(HTMLParser):
    """What a page links to, loads, and can be linked at."""

    links: set[str] = field(default_factory=set)
    loads: set[str] = field(default_factory=set)
    anchors: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        of = {key: value or "" for key, value in attrs}
        self.anchors |= {of["id"]} if "id" in of else set()
        if tag == "a" and "href" in of:
            self.links.add(of["href"])
        if tag in LOADED and LOADED[tag] in of:
            self.loads.add(of[LOADED[tag]])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as ``make docs`` does."""
    out = tmp_path_factory.mktemp("site")
    wanted = re.findall(r"^SPHINX := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[0].split()
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", *wanted, "--builder", "html", "docs", str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    read: dict[Path, Page] = {}
    for path in site.rglob("*.html"):
        read[path] = Page()
        read[path].feed(path.read_text(encoding="utf-8"))
    return read


def test_every_page_of_the_docs_is_in_the_site(site: Path) -> None:
    for text in ROOT.glob("docs/**/*.md"):
        assert (site / text.relative_to(ROOT / "docs")).with_suffix(".html").is_file(), text


def test_every_link_of_the_site_leads_somewhere(pages: dict[Path, Page]) -> None:
    dead = [
        f"{path.name}: {link}"
        for path, page in pages.items()
        for link in page.links | page.loads
        if is_local(link) and not leads_somewhere(path, link, pages)
    ]
    assert not dead


def is_local(link: str) -> bool:
    parts = urlsplit(link)
    return not parts.scheme and not parts.netloc


def leads_somewhere(page: Path, link: str, pages: dict[Path, Page]) -> bool:
    parts = urlsplit(link)
    target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
    if parts.fragment and target in pages:
        return unquote(parts.fragment) in pages[target].anchors
    return target.is_file()


def test_a_page_loads_nothing_from_another_site(site: Path, pages: dict[Path, Page]) -> None:
    assert not [load for page in pages.values() for load in page.loads if not is_local(load)]
    for sheet in site.rglob("*.css"):
        found = re.findall(r"(?:@import|url\()\s*[\"']?((?:https?:)?//[^\"')]*)", sheet.read_text(encoding="utf-8"))
        assert not found, sheet


def links_of(text: Path) -> Iterator[str]:
    for token in MarkdownIt().enable("table").parse(text.read_text(encoding="utf-8")):
        for child in token.children or []:
            target = child.attrs.get("href") or child.attrs.get("src")
            if target is not None:
                yield str(target)


def anchors_of(text: Path) -> set[str]:
    """Of a Markdown page, as its readers make them of headings."""
    tokens = MarkdownIt().parse(text.read_text(encoding="utf-8"))
    headings = [inline.content for token, inline in pairwise(tokens) if token.type == "heading_open"]
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("text", TEXTS, ids=[str(text.relative_to(ROOT)) for text in TEXTS])
def test_every_link_of_the_texts_leads_somewhere(text: Path) -> None:
    for link in filter(is_local, links_of(text)):
        parts = urlsplit(link)
        target = (text.parent / unquote(parts.path)).resolve() if parts.path else text
        assert target.exists(), link
        if parts.fragment:
            assert parts.fragment in anchors_of(target), link
