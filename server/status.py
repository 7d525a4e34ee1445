"""``python -m server status``: where a run stands, from the event log in its output folder."""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from pathlib import Path

from rich.console import Console, RenderableType
from rich.live import Live
from rich.table import Table

from server.events import RunStatus, read_status
from server.progress import bytes_text


def show_status(folder: Path, follow: bool, poll_seconds: float = 1.0) -> None:
    """Prints it once, or keeps it on the screen until the run has ended.

    Raises:
        ValueError: the folder holds no run, or the run has failed.
    """
    status = read_status(folder)
    if follow and sys.stdout.isatty():
        with Live(_table(folder, status)) as live:
            while status.state not in ("finished", "failed"):
                time.sleep(poll_seconds)
                live.update(_table(folder, status := read_status(folder)))
    else:
        while follow and status.state not in ("finished", "failed"):
            time.sleep(poll_seconds)
            status = read_status(folder)
        Console().print(_table(folder, status))
    if status.state == "failed":
        raise ValueError(f"the run failed: {status.reason}")


def _table(folder: Path, status: RunStatus) -> RenderableType:
    left = status.seconds_left
    per_uplink = bytes_text(status.payload_bytes / status.uplinks) if status.uplinks else "-"
    rows = {
        "state": status.state,
        "arm": status.arm,
        "nodes": str(status.nodes),
        "round": f"{status.server_round} of {status.rounds}, {status.answers} answers to the last one",
        "held-out loss": " -> ".join(f"{loss:.4f}" for loss in _ends(status.heldout_loss)) or "-",
        "payloads up": f"{bytes_text(status.payload_bytes)}, {per_uplink} a client and round",
        "arrays down": bytes_text(status.bytes_down),
        "faults": f"{status.faults}{f', last: {status.last_fault}' if status.faults else ''}",
        "time": str(timedelta(seconds=round(status.updated - status.started))),
        "time left": "-" if left is None or status.state != "running" else str(timedelta(seconds=round(left))),
    }
    table = Table(title=str(folder), show_header=False)
    for key, value in rows.items():
        table.add_row(key, value)
    return table


def _ends(losses: list[float]) -> list[float]:
    return losses[:1] + losses[1:][-1:]
