"""Whether a run is alive: a lock and a heartbeat in its output folder, held by the process that runs its rounds.

The lock (``run.lock``, flock) lets one run into a folder at a time. The system drops it when its process ends, however
that ends, so that a dead run never blocks the next. The heartbeat (``heartbeat.json``) says which run, process and host
it is, and when it was last seen: what another host, which cannot see the lock, goes by.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from io import BufferedRandom
from pathlib import Path

from conf.console import printable

LOCK, HEARTBEAT = "run.lock", "heartbeat.json"
BEAT_SECONDS = 5.0
DEAD_SECONDS = 45.0
"""A run of another host whose heartbeat is older is dead."""
_LARGEST = 4096
"""Bytes of a heartbeat."""


class BusyError(ValueError):
    """Another run is in the folder."""


@dataclass(frozen=True)
class Heartbeat:
    """The last sign of life of a run."""

    time: float  # Unix seconds
    run_id: str
    pid: int
    host: str

    @property
    def here(self) -> bool:
        """Whether it is a process of this host, whose lock counts."""
        return self.host == socket.gethostname()


@contextlib.contextmanager
def alive(folder: Path, run_id: str) -> Iterator[None]:
    """Holds the folder while the block runs, and beats every ``BEAT_SECONDS``.

    Raises:
        BusyError: another run is in it.
    """
    with _locked(folder):
        own = Heartbeat(0.0, run_id, os.getpid(), socket.gethostname())
        ended = threading.Event()
        _beat(folder, own)
        thread = threading.Thread(target=_keep_beating, args=(folder, own, ended), name="heartbeat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with (folder / LOCK).open("a+b") as file:
        if not _take(file):
            raise BusyError(_who(folder))
        yield


def _take(file: BufferedRandom) -> bool:
    """Tried for half a second: whoever asks ``is_held`` has the lock for a moment."""
    for _ in range(10):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.05)
        else:
            return True
    return False


def is_held(folder: Path) -> bool:
    """Whether a process of this host holds the folder."""
    try:
        with (folder / LOCK).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no lock: no run since there are locks
        return False
    return False


def is_alive(folder: Path, now: float | None = None) -> bool:
    """By the lock if the run is of this host, else by its heartbeat."""
    beat = read_heartbeat(folder)
    if beat is None or beat.here:
        return is_held(folder)
    return (time.time() if now is None else now) - beat.time < DEAD_SECONDS


def check_free(folder: Path) -> None:
    """Raises BusyError: a run is in the folder."""
    if is_alive(folder):
        raise BusyError(_who(folder))


def _who(folder: Path) -> str:
    beat = read_heartbeat(folder)
    who = "" if beat is None else f" (run {beat.run_id}, process {beat.pid} on {beat.host})"
    return (
        f"output={printable(folder)} is in use by a run that goes on{who}: wait for its end, stop it, or choose "
        "another output; `python -m server status` shows where it stands"
    )


def read_heartbeat(folder: Path) -> Heartbeat | None:
    """The last one. None: there is none, or it cannot be read."""
    try:
        with (folder / HEARTBEAT).open("rb") as file:
            content = json.loads(file.read(_LARGEST))
        beat = Heartbeat(
            float(content["time"]), printable(content["run_id"]), int(content["pid"]), printable(content["host"])
        )
    except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return None
    return beat if 0 <= beat.time < 1e11 else None


def _beat(folder: Path, own: Heartbeat) -> None:
    """Whole or not at all, but not flushed to the disk: after a loss of power there is no life to show."""
    part = folder / f"{HEARTBEAT}.part"
    with contextlib.suppress(OSError):  # a full disk must not end a run that may go on
        part.write_text(json.dumps({**asdict(own), "time": round(time.time(), 3)}))
        os.replace(part, folder / HEARTBEAT)


def _keep_beating(folder: Path, own: Heartbeat, ended: threading.Event) -> None:
    while not ended.wait(BEAT_SECONDS):
        _beat(folder, own)
