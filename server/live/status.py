"""``python -m server status``: where a run stands, from the event log, the lock and the heartbeat in its folder."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from conf.console import bytes_text, is_live, printable, say, seconds_text
from server.records.alive import is_alive, read_heartbeat
from server.records.events import Event, EventReader, RunStatus
from server.records.places import continuation

ENDED = ("finished", "failed", "stopped", "dead")
BATCH = 1000
"""Events that are held at a time."""


class Watcher:
    """Reads a run's folder again and again."""

    def __init__(self, folder: Path, listener: Callable[[Event], None] | None = None) -> None:
        """
        Args:
            folder: of the run.
            listener: is told of every event, too; ``run_started`` begins another run.

        Raises:
            ValueError: the folder holds no run.
        """
        self.folder = folder
        self._reader = EventReader(folder)
        self._listener = listener
        self._status = RunStatus()
        self.status()

    def status(self) -> RunStatus:
        """The run as it stands now: ``dead`` if its process is gone and has not said that it ends.

        Raises:
            ValueError: the folder holds no run any more.
        """
        self._read()
        if self._status.state in ("waiting", "running") and not is_alive(self.folder):
            self._read()  # it may have ended between the two
            status = self._status
            if status.state in ("waiting", "running"):
                beat = read_heartbeat(self.folder)
                status.state, status.updated = "dead", max(status.updated, beat.time if beat is not None else 0.0)
        return self._status

    def _read(self) -> None:
        while events := self._reader.new(BATCH):
            for event in events:
                if event.get("event") == "run_started":  # in a folder where another was before
                    self._status = RunStatus()
                self._status.add(event)
                if self._listener is not None:
                    self._listener(event)


def show_status(folder: Path, follow: bool, poll_seconds: float = 1.0) -> None:
    """Prints it once, or keeps it on the screen until the run has ended; without a terminal prints a line a round.

    Raises:
        ValueError: the folder holds no run, or the run failed or is dead; the message says what goes on with it.
    """
    watcher = Watcher(folder)
    status = watcher.status()
    if follow and sys.stdout.isatty() and is_live():
        with Live(table(folder, status)) as live:
            while status.state not in ENDED:
                time.sleep(poll_seconds)
                live.update(table(folder, status := watcher.status()))
    else:
        _follow_in_lines(watcher, poll_seconds if follow else None)
        status = watcher.status()
        Console(width=None if sys.stdout.isatty() else 100).print(table(folder, status))
    if status.state == "failed":
        raise ValueError(f"the run failed: {status.reason}; {continuation(folder)}")
    if status.state == "dead":
        raise ValueError(f"the run is dead: its process is gone since {_clock(status.updated)}; {continuation(folder)}")


def _follow_in_lines(watcher: Watcher, poll_seconds: float | None) -> None:
    said = None
    while poll_seconds is not None and (status := watcher.status()).state not in ENDED:
        if said != (said := (status.state, status.server_round, len(status.heldout_loss))):
            loss = f", held-out loss {status.heldout_loss[-1]:.4f}" if status.heldout_loss else ""
            say(f"{status.state}, round {status.server_round} of {status.rounds}{loss}{_left(status)}")
        time.sleep(poll_seconds)


def _left(status: RunStatus) -> str:
    left = status.seconds_left
    return "" if left is None or status.state != "running" else f", {seconds_text(left)} left"


def table(folder: Path, status: RunStatus) -> RenderableType:
    """All figures of a run."""
    left = status.seconds_left if status.state == "running" else None
    per_uplink = bytes_text(status.payload_bytes / status.uplinks) if status.uplinks else "-"
    missed = f", {bytes_text(status.bytes_missed)} of it for what clients had missed" if status.bytes_missed else ""
    rows = {
        "state": status.state,
        "run": status.label,
        "nodes": str(status.nodes),
        "round": f"{status.server_round} of {status.rounds}, {status.answers} answers to the last one",
        "held-out loss": " -> ".join(f"{loss:.4f}" for loss in _ends(status.heldout_loss)) or "-",
        **({"loss on nodes": _on_nodes(status)} if status.node_losses else {}),
        "payloads up": f"{bytes_text(status.payload_bytes)}, {per_uplink} a client and round",
        "arrays down": f"{bytes_text(status.bytes_down)}{missed}",
        "faults": f"{status.faults}{f', last: {status.last_fault}' if status.faults else ''}",
        "time": seconds_text(status.updated - status.started),
        "time left": "-" if left is None else seconds_text(left),
        "last sign of life": _clock(status.updated),
    }
    if status.state in ("dead", "stopped", "failed"):
        rows["what now"] = continuation(folder)
    shown = Table(title=Text(printable(folder)), show_header=False)
    for key, value in rows.items():
        shown.add_row(key, Text(value))
    return shown


def _on_nodes(status: RunStatus) -> str:
    losses = " -> ".join(f"{loss:.4f}" for loss in _ends([*status.node_losses.values()]))
    return f"{losses}, worst {status.worst_client}; {bytes_text(status.bytes_evaluating)} of arrays for it"


def _clock(seconds: float) -> str:
    """Local date and time; a dash before the first event."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds)) if seconds else "-"


def _ends(losses: list[float]) -> list[float]:
    return losses[:1] + losses[1:][-1:]
