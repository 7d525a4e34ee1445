"""A run's event log: one JSON object a line, as it happens; what ``python -m server status`` reads.

Every event has ``time`` (Unix seconds) and ``event``: ``run_started``, ``waiting``, ``nodes``, ``round_started``,
``downlink``, ``uplink``, ``fault``, ``node_refused``, ``checkpoint_failed``, ``round_finished``, ``evaluated``,
``evaluated_on_nodes``, ``budget_spent``, ``ended_early``, ``run_resumed``, ``run_finished``, ``run_stopped`` or
``run_failed``. A reader takes what it knows and leaves the rest: a file may be of another version, damaged or hostile.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conf.console import printable
from conf.output import OutputError
from strategies.outcomes import DOWNLINK_BYTES

NAME = "events.jsonl"
LONGEST_LINE = 1 << 16
"""Bytes; what is longer is no event of ours."""
LARGEST = 1 << 62
"""No count of ours is larger."""

WHO, WORDS = "who", "words"
"""What a run's privacy keeps from who looks on, ``withheld`` of ``run_started``: which clients take part when, and what
clients say of their faults, which may quote their data."""

Event = Mapping[str, Any]


class EventLog:
    """Appends events to the run's file, and tells listeners."""

    def __init__(self, folder: Path, keep: bool = False) -> None:
        """A new file, unless ``keep``: a resumed run goes on in the old one."""
        self._path = folder / NAME
        self.listeners: list[Callable[[Event], None]] = []
        if not keep:
            self._path.unlink(missing_ok=True)

    def write(self, event: str, **fields: Any) -> None:
        """Raises OutputError: the file cannot be written to; listeners were told all the same."""
        entry = {"time": round(time.time(), 3), "event": event, **fields}
        for listener in self.listeners:
            listener(entry)
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
        except OSError as error:
            raise OutputError(f"{self._path} cannot be written: {error.strerror}") from None

    @contextlib.contextmanager
    def telling_failure(self) -> Iterator[None]:
        """An error that ends the block is an event, ``run_failed``."""
        try:
            yield
        except Exception as error:
            with contextlib.suppress(OutputError):  # a full disk, perhaps: the error itself says more
                self.write("run_failed", reason=str(error) if isinstance(error, ValueError) else repr(error))
            raise


class EventReader:
    """Reads a log that may grow, piece by piece."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / NAME
        self._offset = 0
        self._file: tuple[int, int] | None = None  # device and inode

    def new(self, most: int | None = None) -> list[Event]:
        """Events since the last call; all of the new file if it was replaced. A line that is still being written is
        left for the next call; what is no JSON object of ours is left out.

        Args:
            most: of them at a time; the next call goes on there, and fewer are the last. None: all of them.

        Raises:
            ValueError: there is no log.
        """
        try:
            with self._path.open("rb") as file:
                stat = self._path.stat()
                if (stat.st_dev, stat.st_ino) != self._file or stat.st_size < self._offset:
                    self._file, self._offset = (stat.st_dev, stat.st_ino), 0
                file.seek(self._offset)
                events: list[Event] = []
                while (most is None or len(events) < most) and (
                    (line := file.readline(LONGEST_LINE)).endswith(b"\n") or len(line) == LONGEST_LINE
                ):
                    if not line.endswith(b"\n"):
                        _skip_line(file)
                    elif (event := _parsed(line)) is not None:
                        events.append(event)
                    self._offset = file.tell()
                return events
        except OSError:
            raise ValueError(f"{printable(self._path.parent)} holds no {NAME}: it is no run's output folder") from None


def _skip_line(file: Any) -> None:
    while (more := file.readline(LONGEST_LINE)) and not more.endswith(b"\n"):
        pass


def _parsed(line: bytes) -> Event | None:
    try:
        event = json.loads(line)
        return event if isinstance(event, dict) and 0 <= number_of(event, "time") < 1e11 else None
    except (ValueError, RecursionError, TypeError, KeyError):
        return None


def number_of(event: Event, key: str) -> float:
    """What stands there, if it is finite. Raises KeyError, TypeError or ValueError: it is missing or something else."""
    value = event[key]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not -LARGEST < value < LARGEST:
        raise TypeError(key)
    return float(value)


def count_of(event: Event, key: str) -> int:
    """A whole number from 0. Raises as ``number_of``."""
    value = event[key]
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < LARGEST:
        raise TypeError(key)
    return value


@dataclass
class RunStatus:
    """Where a run stands, folded from its events."""

    state: str = "unknown"  # waiting | running | finished | failed | stopped; by ``server.live.status`` also dead
    arm: str = ""
    codec: str = ""  # of the arm coded
    run_id: str = ""
    server_round: int = 0  # finished ones
    rounds: int = 0
    nodes: int = 0
    asked: int = 0  # clients of the current round
    answers: int = 0  # in the current round
    heldout_loss: list[float] = field(default_factory=list)
    payload_bytes: int = 0
    bytes_down: int = 0
    bytes_missed: int = 0  # of those: what clients had missed
    bytes_evaluating: int = 0  # of those: for evaluation on the nodes
    evaluates: bool = True  # the server itself: it has a base model
    node_losses: dict[int, float] = field(default_factory=dict)  # round -> the loss over all tokens of the nodes
    worst_client: str = ""  # of the last of those
    uplinks: int = 0
    faults: int = 0
    last_fault: str = ""
    started: float = 0.0
    updated: float = 0.0
    reason: str = ""
    _round_seconds: list[float] = field(default_factory=list)
    _since: float = 0.0  # when the round that is under way began; 0: none is

    @property
    def label(self) -> str:
        """What kind of run it is."""
        return f"{self.arm} ({self.codec})" if self.codec else self.arm

    @property
    def seconds_left(self) -> float | None:
        """From the mean length of the last five rounds; None before the first."""
        recent = self._round_seconds[-5:]
        return sum(recent) / len(recent) * max(0, self.rounds - self.server_round) if recent else None

    def add(self, event: Event) -> None:
        """What is unknown or not of the expected types is left aside."""
        try:
            now, change = number_of(event, "time"), _CHANGES.get(event["event"])
            if change is not None:
                change(self, event)
                self.updated = max(self.updated, now)
        except (KeyError, TypeError, ValueError, OverflowError):
            return

    def _start(self, event: Event) -> None:
        arm, rounds = printable(event["arm"]), count_of(event, "rounds")
        self.state, self.arm, self.rounds, self._since, self.reason = "waiting", arm, rounds, 0.0, ""
        self.codec, self.run_id = printable(event.get("codec", "")), printable(event.get("run_id", ""))
        self.started = self.started or event["time"]
        self.evaluates = event.get("base") != "none"

    def _wait(self, event: Event) -> None:
        self.nodes = count_of(event, "count")

    def _start_round(self, event: Event) -> None:
        asked = count_of(event, "clients")
        self.state, self._since, self.answers, self.asked = "running", self._since or event["time"], 0, asked

    def _take_downlink(self, event: Event) -> None:
        size = sum(count_of(event, key) for key in DOWNLINK_BYTES)
        self.bytes_down += size
        self.bytes_evaluating += size if event.get("evaluating") is True else 0
        self.bytes_missed += count_of(event, "catch_up_bytes") + count_of(event, "snapshot_bytes")

    def _take_uplink(self, event: Event) -> None:
        self.payload_bytes += count_of(event, "payload_bytes")
        self.uplinks, self.answers = self.uplinks + 1, self.answers + 1

    def _take_fault(self, event: Event) -> None:
        self.last_fault = f"partition {printable(event['partition'])}: {printable(event['reason'])}"
        self.faults += 1

    def _finish_round(self, event: Event) -> None:
        self.server_round = count_of(event, "server_round")
        if self._since:
            self._round_seconds.append(max(0.0, event["time"] - self._since))
        self._since = event["time"]

    def _evaluate(self, event: Event) -> None:
        loss, done = event["heldout_loss"], count_of(event, "server_round")
        if isinstance(loss, bool) or not isinstance(loss, (int, float)):
            raise TypeError("heldout_loss")
        finite = isinstance(loss, float) or -LARGEST < loss < LARGEST
        self.heldout_loss[done:] = [float(loss) if finite else math.inf]

    def _evaluate_on_nodes(self, event: Event) -> None:
        if count_of(event, "clients"):
            done, loss = count_of(event, "server_round"), number_of(event, "loss")
            worst = f"{number_of(event, 'worst'):.4f} (client {count_of(event, 'worst_client')})"
            self.node_losses = {n: one for n, one in self.node_losses.items() if n < done} | {done: loss}
            self.worst_client = worst

    def _end_early(self, event: Event) -> None:
        self.reason = printable(event["reason"])

    def _finish(self, event: Event) -> None:
        self.state = "finished"

    def _fail(self, event: Event) -> None:
        self.state, self.reason = "failed", printable(event["reason"])

    def _stop(self, event: Event) -> None:
        self.state = "stopped"


_CHANGES: dict[str, Callable[[RunStatus, Event], None]] = {
    "run_started": RunStatus._start,
    "run_resumed": RunStatus._start,
    "waiting": RunStatus._wait,
    "nodes": RunStatus._wait,
    "round_started": RunStatus._start_round,
    "downlink": RunStatus._take_downlink,
    "uplink": RunStatus._take_uplink,
    "fault": RunStatus._take_fault,
    "round_finished": RunStatus._finish_round,
    "evaluated": RunStatus._evaluate,
    "evaluated_on_nodes": RunStatus._evaluate_on_nodes,
    "budget_spent": RunStatus._end_early,
    "ended_early": RunStatus._end_early,
    "run_finished": RunStatus._finish,
    "run_failed": RunStatus._fail,
    "run_stopped": RunStatus._stop,
}


def read_status(folder: Path) -> RunStatus:
    """The status of the run in the folder, by its events alone. Raises ValueError: there is no event log."""
    status = RunStatus()
    for event in EventReader(folder).new():
        status.add(event)
    return status
