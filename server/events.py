"""A run's event log: one JSON object a line, as it happens; what ``python -m server status`` reads.

Every event has ``time`` (Unix seconds) and ``event``: ``run_started``, ``nodes``, ``round_started``, ``uplink``,
``fault``, ``round_finished``, ``evaluated``, ``run_resumed``, ``run_finished`` or ``run_failed``.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NAME = "events.jsonl"


class EventLog:
    """Appends events to the run's file, and tells listeners."""

    def __init__(self, folder: Path, keep: bool = False) -> None:
        """A new file, unless ``keep``: a resumed run goes on in the old one."""
        self._path = folder / NAME
        self.listeners: list[Callable[[dict[str, Any]], None]] = []
        if not keep:
            self._path.unlink(missing_ok=True)

    def write(self, event: str, **fields: Any) -> None:
        entry = {"time": round(time.time(), 3), "event": event, **fields}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        for listener in self.listeners:
            listener(entry)


@dataclass
class RunStatus:
    """Where a run stands, folded from its events."""

    state: str = "unknown"  # waiting | running | finished | failed
    arm: str = ""
    server_round: int = 0  # finished ones
    rounds: int = 0
    nodes: int = 0
    answers: int = 0  # in the current round
    heldout_loss: list[float] = field(default_factory=list)
    payload_bytes: int = 0
    bytes_down: int = 0
    uplinks: int = 0
    faults: int = 0
    last_fault: str = ""
    started: float = 0.0
    updated: float = 0.0
    reason: str = ""
    _round_seconds: list[float] = field(default_factory=list)
    _since: float = 0.0  # when the round that is under way began; 0: none is

    @property
    def seconds_left(self) -> float | None:
        """From the mean length of the last five rounds; None before the first."""
        recent = self._round_seconds[-5:]
        return sum(recent) / len(recent) * (self.rounds - self.server_round) if recent else None

    def add(self, entry: dict[str, Any]) -> None:
        """Raises KeyError or TypeError: it is no event of ours."""
        event, now = entry["event"], entry["time"]
        self.updated = now
        if event in ("run_started", "run_resumed"):
            self.state, self.arm, self.rounds, self._since = "waiting", entry["arm"], entry["rounds"], 0.0
            self.started = self.started or now
        elif event == "nodes":
            self.nodes = entry["count"]
        elif event == "round_started":
            self.state, self._since, self.answers = "running", self._since or now, 0
            self.bytes_down += entry["bytes_down"]
        elif event == "uplink":
            self.uplinks, self.answers = self.uplinks + 1, self.answers + 1
            self.payload_bytes += entry["payload_bytes"]
        elif event == "fault":
            self.faults, self.last_fault = self.faults + 1, f"partition {entry['partition']}: {entry['reason']}"
        elif event == "round_finished":
            self.server_round = entry["server_round"]
            self._round_seconds.append(now - self._since)
            self._since = now
        elif event == "evaluated":
            self.heldout_loss = [*self.heldout_loss[: entry["server_round"]], entry["heldout_loss"]]
        elif event == "run_finished":
            self.state = "finished"
        elif event == "run_failed":
            self.state, self.reason = "failed", entry["reason"]


def read_status(folder: Path) -> RunStatus:
    """The status of the run in the folder.

    Raises:
        ValueError: there is no event log. A last line that is still being written is left out.
    """
    path = folder / NAME
    if not path.is_file():
        raise ValueError(f"{folder} holds no {NAME}: it is no run's output folder")
    status = RunStatus()
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            status.add(json.loads(line))
        except (json.JSONDecodeError, KeyError, TypeError):
            continue
    return status
