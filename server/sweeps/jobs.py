"""The jobs of a sweep: what each leaves in its folder, wherever it ran, and how they are told side by side.

A job may run in another process or on another host than the sweep: the file that it leaves is all that the sweep hears
of it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from conf.console import bytes_text, printable
from conf.output import write_json
from server.records.curves import pareto_front

if TYPE_CHECKING:
    from server.records.results import RunResults

LONGEST_NAME = 80
"""Characters of a job's folder; file systems take 255 bytes."""
LEFT = "job.json"
"""What a job leaves in its folder: that it began, and how it ended."""
_LARGEST = 1 << 16
"""Bytes of such a file."""
UNDER_WAY = "running"
SHOWN = 20
"""Jobs that a line names."""


@dataclass
class Job:
    """What became of one run of a sweep."""

    number: int
    differs: str = ""  # the settings by which it differs from the others
    label: str = ""  # arm and codec
    folder: str = ""
    state: str = UNDER_WAY  # running | finished | failed | stopped
    reason: str = ""
    heldout_loss: float | None = None
    payload_bytes_per_client_round: float | None = None
    bits_per_parameter: float | None = None
    total_bytes: int | None = None  # both ways and for all clients; None: nothing was sent
    seconds: float | None = None
    target_loss: float | None = None  # of a search for the fewest bytes
    pareto: bool = False  # no other has a lower loss for as many bytes or fewer, or as low a loss for fewer
    sweep: str = ""  # which it belongs to

    def take(self, results: RunResults) -> None:
        """The figures of its run."""
        self.heldout_loss, self.seconds = results.final_loss, results.seconds
        self.payload_bytes_per_client_round = results.payload_bytes_per_client_round
        if results.uplinks:
            self.bits_per_parameter, self.total_bytes = results.bits_per_parameter, results.account().total


def folder_name(number: object, differs: str) -> str:
    """``NUMBER-WHAT,DIFFERS``, at most ``LONGEST_NAME`` characters that every file system takes; what is cut is
    replaced by a digest, so that no two jobs share a name."""
    whole = re.sub(r"[^A-Za-z0-9_.=,+-]+", "_", f"{number}-{differs}".rstrip("-"))
    if len(whole) <= LONGEST_NAME:
        return whole
    digest = hashlib.sha256(differs.encode(errors="replace")).hexdigest()[:8]
    return f"{whole[: LONGEST_NAME - len(digest) - 1]}-{digest}"


def leave(job: Job, folder: Path) -> None:
    """Writes what is known of the job into its folder. Raises OutputError."""
    write_json(dataclasses.asdict(job), folder / LEFT)


def collect(folder: Path, sweep: str) -> dict[int, Job]:
    """By number, the jobs of this sweep that left something below the folder; what is no file of ours, or of an
    earlier sweep in the same folder, is left out."""
    found = (_read(path) for path in sorted(folder.rglob(LEFT)))
    return {job.number: job for job in found if job is not None and job.sweep == sweep}


def _read(path: Path) -> Job | None:
    try:
        with path.open("rb") as file:
            job = Job(**json.loads(file.read(_LARGEST)))
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    texts = (job.differs, job.label, job.folder, job.state, job.reason, job.sweep)
    figures = (job.heldout_loss, job.payload_bytes_per_client_round, job.bits_per_parameter, job.total_bytes)
    known = all(type(text) is str for text in texts) and type(job.number) is int
    counted = all(type(one) in (int, float, type(None)) for one in (*figures, job.seconds, job.target_loss))
    return job if known and counted else None


def complete(expected: Mapping[int, str], left: Mapping[int, Job], stopped: bool, sweep: str = "") -> list[Job]:
    """All jobs of a sweep that has ended, by number.

    Args:
        expected: number -> settings by which it differs, of those that should have run.
        left: what jobs left.
        stopped: whether the user ended the sweep.
        sweep: which it is.
    """
    jobs = []
    for number in sorted({*expected, *left}):
        job = left.get(number) or Job(number, expected[number], sweep=sweep, reason="it left nothing: it never began")
        if job.state == UNDER_WAY:  # nothing of the sweep runs any more
            job.state = "stopped" if stopped else "failed"
            if number in left:
                job.reason = "Ctrl-C" if stopped else "its process ended before it did: killed, or out of memory"
        jobs.append(job)
    mark_pareto(jobs)
    return jobs


def mark_pareto(jobs: Iterable[Job]) -> None:
    """Sets ``pareto``: among those that finished and sent something, by loss and bytes in all."""
    judged = [
        (job, (float(job.total_bytes), job.heldout_loss))
        for job in jobs
        if job.state == "finished" and job.total_bytes is not None
        if job.heldout_loss is not None and not math.isnan(job.heldout_loss)
    ]
    for (job, _), unbeaten in zip(judged, pareto_front([point for _, point in judged]), strict=True):
        job.pareto = unbeaten


def best_of(jobs: Iterable[Job]) -> Job | None:
    """Of a search the job with the fewest bytes among those that kept the loss; None: none did, or it was no search."""
    kept = [
        job
        for job in jobs
        if job.target_loss is not None and job.heldout_loss is not None and job.heldout_loss <= job.target_loss
    ]
    return min((job for job in kept if job.total_bytes is not None), key=lambda job: job.total_bytes or 0, default=None)


def summary_of(jobs: Sequence[Job]) -> dict[str, Any]:
    """As JSON: what the table tells, and more."""
    best = best_of(jobs)
    found = {} if best is None else {"best": best.number}
    return {"jobs": [dataclasses.asdict(job) for job in jobs], **found}


def table_of(jobs: Sequence[Job]) -> Table:
    """One line a job; ``*`` in the column ``best`` marks those that no other beats in loss and bytes."""
    table = Table(title=f"sweep of {len(jobs)} jobs", title_justify="left")
    for column in ("job", "differs", "what", "loss", "bytes up", "bits", "in all", "seconds", "best", "state"):
        right = column not in ("differs", "what", "state")
        table.add_column(column, justify="right" if right else "left", overflow="fold")
    for job in jobs:
        sent, total, bits, seconds = (
            job.payload_bytes_per_client_round,
            job.total_bytes,
            job.bits_per_parameter,
            job.seconds,
        )
        table.add_row(
            str(job.number),
            Text(printable(job.differs)),
            Text(printable(job.label)),
            "-" if job.heldout_loss is None else f"{job.heldout_loss:.4f}",
            "-" if sent is None else bytes_text(sent),
            "-" if bits is None else f"{bits:.3f}",
            "-" if total is None else bytes_text(total),
            "-" if seconds is None else f"{seconds:.0f}",
            "*" if job.pareto else "",
            Text(printable(job.state), style="" if job.state == "finished" else "bold red"),
        )
    return table
