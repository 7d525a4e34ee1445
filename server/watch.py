"""A live view of a run, on a terminal or as a page on this host.

python -m server.watch [RUN] [--every SECONDS]     until the run has ended, or Ctrl-C
python -m server.watch [RUN] --page 8080           serves http://127.0.0.1:8080/ until Ctrl-C

Shows rounds and time left, held-out loss, what each client does, bytes and faults, from the event log in the run's
folder: of a run that goes on, and of one that has ended. Where there is no terminal it prints that once.
`python -m server status` says in a table, and by its exit status, where a run stands, and is for scripts, too; this one
is to be looked at, knows single clients, and ends with 0.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
import threading
import time
from pathlib import Path

from rich.console import Console
from rich.live import Live

from conf.console import is_live, printable
from server.live.view import picture
from server.live.watched import RunWatch
from server.records.places import LATEST, found

WIDTH = 80
"""Columns where there is no terminal."""


def main() -> None:
    args = _parser().parse_args()
    with contextlib.suppress(KeyboardInterrupt):
        try:
            if not (math.isfinite(args.every) and 0.1 <= args.every <= 3600):
                raise ValueError(f"--every={args.every} must lie between 0.1 and 3600 seconds")
            folder = found(args.run)
            if args.page is not None:
                serve(folder, args.page)
            else:
                show(folder, args.every)
        except ValueError as error:
            sys.exit(f"error: {printable(error)}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m server.watch", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", nargs="?", default=LATEST, help="its output folder (default: the run started last)")
    parser.add_argument("--every", type=float, default=1.0, metavar="SECONDS", help="between two looks (default 1)")
    parser.add_argument("--page", type=int, metavar="PORT", help="serve a page on 127.0.0.1 instead")
    return parser


def show(folder: Path, every: float = 1.0) -> None:
    """Keeps it on the terminal until the run has ended, and leaves the last picture there; elsewhere prints it once.

    Raises:
        ValueError: the folder holds no run, or none any more.
    """
    watch = RunWatch(folder)
    seen = watch.look()
    console = Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)
    if sys.stdout.isatty() and is_live() and not seen.has_ended:
        with contextlib.suppress(KeyboardInterrupt), Live(console=console, screen=True, auto_refresh=False) as live:
            while not seen.has_ended:
                live.update(picture(seen, console, console.height), refresh=True)
                time.sleep(every)
                seen = watch.look()
    console.print(picture(seen, console))


def serve(folder: Path, port: int) -> None:
    """Serves the page of a run until Ctrl-C.

    Raises:
        ValueError: the folder holds no run, or the port is not to be had.
    """
    from server.live.page import serve_page

    RunWatch(folder)
    if not 1 <= port <= 65535:
        raise ValueError(f"--page={port} must lie between 1 and 65535")
    with serve_page(port, folder, "--page"):
        print(f"http://127.0.0.1:{port}/ shows {printable(folder)} until Ctrl-C", flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
