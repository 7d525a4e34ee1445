"""A browser for tests of pages: a Chromium that is installed, without a window. None is downloaded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from shutil import which
from typing import Any

import pytest

CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := which(name))), None)
WIDTHS = (390, 1440)


def in_a_browser(test: Any) -> Any:
    """Marks a test that is skipped where there is no browser."""
    without = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
    undriven = pytest.mark.skipif(find_spec("playwright") is None, reason="playwright is not installed")
    return without(undriven(test))


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser of ``playwright``."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


def opened(browser: Any, address: str, width: int = 1440, light: str = "light") -> tuple[Any, list[str], list[str]]:
    """A page, what it says to the console or in dialogs, and what it asks for: two lists that grow."""
    page = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=light).new_page()
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: said.append(dialog.message))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)
    return page, said, asked
