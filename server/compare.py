"""Several finished runs beside each other: which settings differ, loss over rounds and bytes, who is on the front.

python -m server.compare outputs/federate/dense outputs/federate/coded [--output outputs/compare]
python -m server.compare multirun/2026-01-31/12-00-00                  # a sweep, those that failed among them

RUN is a finished run's output folder, a sweep's folder, or a folder in which folders of runs lie. Runs that differ by
their seed alone are put together: means, and the standard deviation over seeds. Writes report.html, which needs no
network, its values as report.json, and one row a run as report.csv.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from conf.console import printable
from report.page import shown
from server.pages.comparison import REPORT, Kind, kinds_table, write_comparison
from server.records.finished import Failure, read_runs

if TYPE_CHECKING:
    from rich.table import Table as ConsoleTable


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m server.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's or a sweep's output folder")
    parser.add_argument("--output", type=Path, default=Path("outputs/compare"), help="default outputs/compare")
    args = parser.parse_args()
    try:
        runs, failures = read_runs([run.expanduser() for run in args.runs])
        kinds = write_comparison(runs, failures, args.output.expanduser(), "Runs beside each other")
    except ValueError as error:
        sys.exit(f"error: {printable(error)}")
    _print(kinds, failures)
    print(f"report: {args.output / REPORT}")


def _print(kinds: Sequence[Kind], failures: Sequence[Failure]) -> None:
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 120).print(_table(kinds))
    for failure in failures:
        print(f"{failure.folder} did not finish: {failure.reason}", file=sys.stderr)


def _table(kinds: Sequence[Kind]) -> ConsoleTable:
    from rich.table import Table as ConsoleTable
    from rich.text import Text

    told = kinds_table(kinds)
    table = ConsoleTable(title=told.title, title_justify="left")
    for column in told.columns:
        table.add_column(column, justify="left" if column == told.columns[0] else "right", overflow="fold")
    for row in told.rows:
        table.add_row(*(Text(shown(cell)) for cell in row))
    return table


if __name__ == "__main__":
    main()
