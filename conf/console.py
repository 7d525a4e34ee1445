"""What people see while a program works: one bar on a terminal, plain lines with the time everywhere else.

All of it goes to standard error: standard output is for results. Text from peers, files and engines passes through
``printable`` first, so that nobody's text moves the cursor, hides a line or is taken for markup.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

LINE_SECONDS = 10.0
"""Between two plain lines of work that has many small steps."""
LONGEST = 500
"""Characters that are shown of one foreign text."""
_CONTROLS = frozenset(map(chr, (*range(32), *range(127, 160)))) - {"\n", "\t"}


def printable(text: object, longest: int = LONGEST) -> str:
    """One line without control characters, terminal escapes and characters that change the reading direction; what
    is longer than ``longest`` characters is cut."""
    text = str(text)
    kept = "".join(c if c.isprintable() else " " if c.isspace() else "" for c in text[: 4 * longest])
    return kept if len(kept) <= longest and len(text) <= 4 * longest else kept[: longest - 4] + " ..."


def visible(text: str) -> str:
    """All of a text, with control characters, such as a terminal's escape, spelt out."""
    return "".join(f"\\x{ord(char):02x}" if char in _CONTROLS else char for char in text)


def is_live() -> bool:
    """Whether standard error is a terminal that can redraw a line."""
    return sys.stderr.isatty() and os.environ.get("TERM", "") not in ("", "dumb", "unknown")


def say(text: object) -> None:
    """One line with date and time to standard error."""
    print(time.strftime("%Y-%m-%d %H:%M:%S"), printable(text), file=sys.stderr, flush=True)


def bytes_text(count: float) -> str:
    """A number of bytes with its decimal unit, as ``3.1 KB``."""
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def seconds_text(seconds: float) -> str:
    """``1 day, 2:03:04``, for any number."""
    return str(timedelta(seconds=round(min(max(seconds, 0.0), 1e9)))) if seconds == seconds else "-"


class Display:
    """How far a piece of work is, and what happens meanwhile, as lines with the time."""

    live = False

    def __init__(self) -> None:
        self._last = 0.0

    def show(self, done: float, total: float, text: str) -> None:
        """The state of the work, in words and with units; ``done`` and ``total`` in the same unit."""
        now = time.monotonic()
        if now - self._last >= LINE_SECONDS or done == total:
            self._last = now
            say(text)

    def tell(self, text: str) -> None:
        """Something that happened, and stays on the screen."""
        say(text)


class LiveDisplay(Display):
    """The same as one bar on a terminal, what happens above it."""

    live = True

    def __init__(self, shown: Progress) -> None:
        super().__init__()
        self._shown = shown
        self._task = shown.add_task("", total=None, text="")

    def show(self, done: float, total: float, text: str) -> None:
        self._shown.update(self._task, completed=done, total=total or None, text=printable(text))

    def tell(self, text: str) -> None:
        self._shown.console.print(Text(f"{time.strftime('%H:%M:%S')} {printable(text)}"))


@contextmanager
def display() -> Iterator[Display]:
    """What fits standard error."""
    if not is_live():
        yield Display()
        return
    console = Console(stderr=True)
    bar = BarColumn(bar_width=max(6, min(40, console.width - 74)))
    with Progress(bar, TextColumn("{task.fields[text]}", markup=False), console=console) as shown:
        yield LiveDisplay(shown)


@contextmanager
def steps(what: str, unit: str = "steps") -> Iterator[Callable[[int, int, str], None]]:
    """Progress of work in equal steps: ``on_step(step, total, note)``; the time left goes by their mean length."""
    began = time.monotonic()
    with display() as shown:

        def on_step(step: int, total: int, note: str = "") -> None:
            passed = time.monotonic() - began
            left = f", {seconds_text(passed / step * (total - step))} left" if step else ""
            shown.show(step, total, f"{what}: {step:,} of {total:,} {unit}{f', {note}' if note else ''}{left}")

        yield on_step
