"""What a node's owner reads: one line an event, with its time, taken from the logs of the node's own programs.

Flower's SuperNode says in its log when it has the server and when it lost it; our own programs write a note (``note``)
a message: the round, its loss, seconds and bytes. Loads nothing but the standard library.
"""

from __future__ import annotations

import logging
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from client.line import Meter

if TYPE_CHECKING:
    from client.work import Trained

NOTE = " node: "
"""Marks the lines of a log that its reader passes on to the console."""
STARTING, WAITING, CONNECTED = "starting", "waiting for the server", "connected"
MAX_LETTERS = 500
_BYTES_TO_SEND = re.compile(r"([\d,]+) bytes to send$")
_NOTES = logging.getLogger("cg-fedllm.node")


def now() -> str:
    """This moment in UTC, to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def note(text: str) -> None:
    """An event of this process, as one line of its log; silent in a process that is no node's."""
    _NOTES.info(_one_line(text))


def _one_line(text: str) -> str:
    """Without control characters, by which a server's words could reach the terminal's own."""
    return "".join(letter for letter in " ".join(text.split()) if letter.isprintable())[:MAX_LETTERS]


def round_line(server_round: int, done: Trained) -> str:
    """What a client has done in a round: loss, seconds, and the bytes of its reply."""
    num_bytes = len(done.payload) if done.payload is not None else sum(a.nbytes for a in (done.adapter or {}).values())
    return (
        f"round {server_round}: loss {done.train_loss:.4f}, {done.seconds_train:.1f} s training, "
        f"{done.seconds_encode:.1f} s encoding, {num_bytes:,} bytes to send"
    )


def write_notes() -> None:
    """To this process's standard output, which is its log: notes, and what others log, all of them with times."""
    logging.basicConfig(format="%(asctime)sZ %(levelname)s %(message)s", datefmt="%Y-%m-%dT%H:%M:%S", stream=sys.stdout)
    logging.Formatter.converter = time.gmtime
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter(f"%(asctime)sZ{NOTE}%(message)s", "%Y-%m-%dT%H:%M:%S"))
    _NOTES.handlers, _NOTES.propagate = [handler], False
    _NOTES.setLevel(logging.INFO)


def print_event(text: str) -> None:
    """A line on the console, with its time."""
    print(f"{now()} {text}", flush=True)


def _measure(meter: Meter, line: str) -> None:
    if (made := _BYTES_TO_SEND.search(line)) is not None and NOTE in line:
        meter.reply_made(int(made[1].replace(",", "")))
    elif "Sending: train message" in line:
        meter.sending(time.monotonic())
    elif "Sent successfully" in line:
        meter.sent(time.monotonic())


class PartitionConsole:
    """The events of one partition, as its programs' logs grow."""

    def __init__(
        self, partition: int, logs: Sequence[Path], say: Callable[[str], None], meter: Meter | None = None
    ) -> None:
        """Only what is logged from now on counts; ``say`` gets a line an event, ``meter`` what tells of the line."""
        self._meter = meter
        self.state = self._before = STARTING
        self._name, self._say = f"partition {partition}", say
        self._read = {log: log.stat().st_size if log.is_file() else 0 for log in logs}

    def poll(self) -> None:
        """Passes on what is new."""
        for log in self._read:
            for line in self._new_lines(log):
                if self._meter is not None:
                    _measure(self._meter, line)
                if (text := self._event(line)) is not None:
                    self._say(f"{self._name}: {text}")

    def _event(self, line: str) -> str | None:
        if NOTE in line:
            return _one_line(line.split(NOTE, 1)[1])
        if "Connection attempt failed" in line and self.state != WAITING:
            self._before, self.state = self.state, WAITING
            return WAITING
        if "Starting Flower SuperNode" in line:
            self.state = STARTING
        if "SuperNode ID: " in line:  # said once it is in
            self.state = CONNECTED
            return f"{CONNECTED} as node {line.rsplit(' ', 1)[-1]}"
        if "Connection successful" in line and self.state == WAITING:
            self.state = self._before
            return "the server answers again"
        return None

    def _new_lines(self, log: Path) -> Iterator[str]:
        """Whole ones; the rest comes the next time."""
        if not log.is_file():
            return
        with log.open("rb") as file:
            file.seek(self._read[log])
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._read[log] += len(line)
                yield line.decode(errors="replace").rstrip()
