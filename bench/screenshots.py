"""A picture of a page's beginning, as the documents show it; needs an installed Chromium.

python -m bench.screenshots outputs/demo/report.html docs/figures/report.png [--width 1040] [--height 1200] [--dark]
python -m bench.screenshots http://127.0.0.1:8080/ docs/figures/live-page.png --height 1000
"""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path
from shutil import which

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
NUM_COLOURS = 128
"""Of the picture: a page has few, and a file of the repository is to be small."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", metavar="PAGE", help="report.html, or the address of a live page on this host")
    parser.add_argument("picture", type=Path, metavar="PNG")
    parser.add_argument("--width", type=int, default=1040, help="pixels (default 1040; a phone has 390)")
    parser.add_argument("--height", type=int, default=1200, help="pixels (default 1200)")
    parser.add_argument("--dark", action="store_true")
    args = parser.parse_args()
    try:
        take(args.page, args.picture, args.width, args.height, dark=args.dark)
    except ValueError as error:
        sys.exit(f"error: {error}")


def browser_path() -> str:
    """Of an installed Chromium. Raises ValueError: there is none."""
    found = next((path for name in BROWSERS if (path := which(name))), None)
    if found is None:
        raise ValueError(f"none of {', '.join(BROWSERS)} is installed: apt-get install chromium")
    return found


def take(page: str, picture: Path, width: int, height: int, *, dark: bool = False) -> None:
    """Raises ValueError: there is no page, or no browser."""
    is_live = page.startswith(("http://127.0.0.1:", "http://localhost:"))
    if not is_live and not Path(page).is_file():
        raise ValueError(f"{page} is no file")
    browser_at = browser_path()
    from PIL import Image
    from playwright.sync_api import sync_playwright

    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=browser_at, args=["--no-sandbox"])
        light = "dark" if dark else "light"
        shown = browser.new_page(viewport={"width": width, "height": height}, color_scheme=light)
        shown.goto(page if is_live else Path(page).absolute().as_uri())
        shown.wait_for_selector("html[data-drawn], html[data-updates]")
        taken = shown.screenshot()
        browser.close()
    Image.open(io.BytesIO(taken)).convert("RGB").quantize(NUM_COLOURS).save(picture, optimize=True)


if __name__ == "__main__":
    main()
