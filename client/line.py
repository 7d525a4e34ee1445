"""How fast a node's line to the server is, as measured from one reply to the next, and what it then sends at most.

Flower's SuperNode says in its log when it begins to send a reply and when all of it is sent; how large the reply is
its trainer says. What was measured lies in a file, from which the trainer takes it before it encodes the next payload.
"""

from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path

_LOG = logging.getLogger(__name__)
LEAST_BITS = 0.05
"""A parameter: below it a payload says little, and a line that takes longer even so is waited for."""
LEAST_SECONDS = 2.0
"""Measured is to half a second, and half a second of a reply are round trips."""


@dataclass(frozen=True)
class Line:
    """One partition's."""

    file: Path
    seconds: float  # that a payload may take

    def most_bits(self, num_parameters: int) -> float | None:
        """That a payload may take a parameter, ``LEAST_BITS`` at least; None: nothing was measured yet."""
        speed = read_speed(self.file)
        return None if speed is None else max(LEAST_BITS, 8 * speed * self.seconds / num_parameters)


class Meter:
    """Notes what a partition's programs say in their logs."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._size: int | None = None
        self._began: float | None = None

    def reply_made(self, size: int) -> None:
        """A payload of so many bytes will be sent."""
        self._size = size

    def sending(self, now: float) -> None:
        self._began = now

    def sent(self, now: float) -> None:
        """All of it, which is when its line is known."""
        if self._size is not None and self._began is not None:
            write_speed(self._file, self._size / max(now - self._began, 0.1))
        self._size = self._began = None


def write_speed(file: Path, bytes_a_second: float) -> None:
    """Whole or not at all; a disk that is full costs the measurement alone."""
    part = file.with_suffix(".part")
    try:
        part.write_text(json.dumps({"bytes_a_second": bytes_a_second}))
        os.replace(part, file)
    except OSError as error:
        _LOG.warning("what the line bears is not kept: %s", error)


def read_speed(file: Path) -> float | None:
    """Inverse of ``write_speed``; None: nothing was measured, or cannot be read."""
    try:
        return float(json.loads(file.read_text())["bytes_a_second"])
    except (OSError, ValueError, LookupError, TypeError):
        return None
