"""The report of a sweep that has ended, in its folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from conf.console import printable, say
from server.pages.comparison import REPORT, write_comparison
from server.records.finished import read_jobs
from server.sweeps.jobs import Job


def compare_jobs(folder: Path, jobs: Sequence[Job]) -> None:
    """Writes it; what is wrong with it is said, and ends nothing."""
    try:
        runs, failures = read_jobs([(job.folder, job.state, job.reason) for job in jobs])
        if not runs:  # each has said why
            return
        write_comparison(runs, failures, folder, f"Sweep of {len(jobs):,} runs")
        print(f"report: {folder / REPORT}")
    except Exception as error:
        say(f"warning: no report of the sweep: {printable(repr(error))}")
