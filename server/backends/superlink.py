"""The back end ``superlink``: hands the run to a running SuperLink and follows it to its end.

The ServerApp writes its results on the SuperLink's host, into the run's ``output``. The run's status is taken from
the engine, since ``flwr run --stream`` exits 0 even when a run fails; what happens in it, and whether its process
lives, from its output folder, where that is on this host.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf import CHECKOUT
from conf.console import display, printable, say
from conf.schema import Settings
from server.live.progress import RunView
from server.records.alive import Heartbeat, is_alive, read_heartbeat
from server.records.events import NAME, EventLog, EventReader, read_status
from server.records.places import continuation

if TYPE_CHECKING:  # slow to import, and not needed to refuse a connection
    from server.records.results import RunResults

POLL_SECONDS = 2.0
START_SECONDS, ASK_SECONDS = 10.0, 20.0
"""How often the SuperLink is asked until the run's process is seen on this host, or always if it is on another, and
while it is seen alive: every time starts a program of Flower's, which takes more than a second of a core that nodes
may need."""
PATIENCE_SECONDS = 300.0
"""How long a SuperLink may be silent before the run is given up here; it goes on there."""
STOP_SECONDS = 90.0
"""How long a run may take to stop."""


def run_on_superlink(settings: Settings) -> RunResults:
    """Submits the run and waits for it.

    Raises:
        ValueError: no SuperLink under that name, or the run failed or died; the message has the reason and what goes
            on with it.
        KeyboardInterrupt: the user stopped it; the message says what happened.
    """
    connection = settings.backend.connection
    if not (_flwr_home() / "config.toml").is_file():  # Flower would make one, of servers that are not ours
        raise ValueError(
            f"backend.connection={connection!r} is not known: {_flwr_home()} names no SuperLink. Set FLWR_HOME to the "
            "folder `flwr` of a running one, as `python -m server start` prints it"
        )
    output = Path(settings.output)
    reader = EventReader(output)
    if settings.resume is None:
        (output / NAME).unlink(missing_ok=True)  # of an earlier run: nobody shall take it for this one
    with tempfile.TemporaryDirectory() as folder:
        overrides = Path(folder) / "run.toml"
        overrides.write_text(f"settings = {json.dumps(settings.to_json())}\n")  # a JSON string is a TOML string
        run_id = _flwr("run", str(CHECKOUT), connection, "--run-config", str(overrides)).get("run-id")
    if run_id is None:
        raise ValueError(f"SuperLink {connection!r} gave no run id")
    run = DeployedRun(connection, str(run_id), settings, reader)
    say(f"run {run_id} on SuperLink {connection!r}")
    try:
        status = run.follow()
    except KeyboardInterrupt:
        raise KeyboardInterrupt(run.stop()) from None
    if status != "finished:completed":
        raise ValueError(run.why(status))
    from server.records.results import load_results

    return load_results(output / "results.json", settings)


@dataclass
class DeployedRun:
    """A run at a SuperLink, as it can be seen from here."""

    connection: str
    run_id: str
    settings: Settings
    reader: EventReader
    died: str = ""  # how, if its process is gone though the SuperLink does not know yet
    _answered: float = field(default_factory=time.monotonic)
    _seen_alive: bool = False

    @property
    def output(self) -> Path:
        return Path(self.settings.output)

    def follow(self) -> str:
        """Shows it until it has ended. Returns the engine's status, or ``died``. Raises ValueError: the SuperLink is
        silent for too long, or does not know the run."""
        with display() as shown:
            view = RunView(shown)
            for event in self._new_events():  # of the run that is resumed
                view.skip(event)
            shown.show(0, 0, f"run {self.run_id} on {self.connection}")
            status, silent, asked = "submitted", False, time.monotonic()
            while not status.startswith("finished"):
                if time.monotonic() - asked >= self._ask_seconds():
                    status, asked = self._status(), time.monotonic()
                if silent != (silent := not status):
                    shown.tell("the SuperLink does not answer" if silent else "the SuperLink answers again")
                for event in self._new_events():
                    view(event)
                if not status.startswith("finished") and self._is_dead():
                    with contextlib.suppress(ValueError):
                        self._stop()
                    return "died"
                time.sleep(0 if status.startswith("finished") else POLL_SECONDS)
        return status

    def _new_events(self) -> list[Any]:
        with contextlib.suppress(ValueError):  # its disk is not this one, or nothing has happened yet
            return self.reader.new()
        return []

    def _status(self) -> str:
        """Empty: no answer. A SuperLink that was killed comes back, and the run with it."""
        try:
            runs = _flwr("list", self.connection, "--run-id", self.run_id).get("runs") or []
        except ValueError:
            if time.monotonic() - self._answered > PATIENCE_SECONDS:
                raise
            return ""
        self._answered = time.monotonic()
        if not runs:
            raise ValueError(f"SuperLink {self.connection!r} does not know run {self.run_id} any more")
        return str(runs[0]["status"])

    def _own_beat(self) -> Heartbeat | None:
        """The heartbeat of its process, if that runs on this host."""
        beat = read_heartbeat(self.output)
        return beat if beat is not None and beat.here and beat.run_id == self.settings.run_id else None

    def _lives_here(self) -> bool:
        return self._own_beat() is not None and is_alive(self.output)

    def _ask_seconds(self) -> float:
        if self._lives_here():
            return ASK_SECONDS
        return POLL_SECONDS if self._seen_alive else START_SECONDS

    def _is_dead(self) -> bool:
        """Whether its process, which was seen alive on this host, has gone. The engine takes a minute to see that."""
        if (beat := self._own_beat()) is None:
            return False
        if is_alive(self.output):
            self._seen_alive = True
            return False
        if not self._seen_alive or _state(self.output) not in ("waiting", "running"):
            return False
        self.died = f"its server app (process {beat.pid}) is gone: killed, or out of memory"
        return True

    def why(self, status: str) -> str:
        """What a run that did not complete died of, in one line, and what goes on with it."""
        head = f"run {self.run_id} {'died' if self.died else f'ended with {status}'}"
        reason = self.died or self._reason() or _log_tail(self.connection, self.run_id)
        return f"{head}: {reason}; {continuation(self.output)}"

    def _reason(self) -> str:
        """By its own log."""
        try:
            status = read_status(self.output)
        except ValueError:
            return ""
        if status.state == "running" and not is_alive(self.output):
            return "its server app is gone: killed, or out of memory"
        return status.reason

    def stop(self) -> str:
        """Stops it at the SuperLink and waits for its end; a second Ctrl-C leaves it running. Returns what happened."""
        command = f"FLWR_HOME={shlex.quote(str(_flwr_home()))} flwr stop {self.run_id} {shlex.quote(self.connection)}"
        goes_on = f"run {self.run_id} goes on at SuperLink {self.connection!r}; `{command}` stops it"
        say(f"stopping run {self.run_id} (Ctrl-C again leaves it running)")
        try:
            self._stop()
            deadline = time.monotonic() + STOP_SECONDS
            while not self._has_ended():
                if time.monotonic() > deadline:
                    return f"run {self.run_id} has not stopped within {STOP_SECONDS:.0f} s: `{command}` tries it again"
                time.sleep(0.5)
        except KeyboardInterrupt:
            return goes_on
        except ValueError as error:
            return f"{goes_on} ({error})"
        with contextlib.suppress(ValueError, OSError):
            if read_status(self.output).state not in ("finished", "failed"):
                EventLog(self.output, keep=True).write("run_stopped")
        return f"run {self.run_id} is stopped; {continuation(self.output)}"

    def _stop(self) -> None:
        _flwr("stop", self.run_id, self.connection)

    def _has_ended(self) -> bool:
        """At the SuperLink, and its process on this host, too."""
        return self._status().startswith("finished") and not self._lives_here()


def _state(output: Path) -> str:
    try:
        return read_status(output).state
    except ValueError:
        return ""


def _flwr(*arguments: str) -> dict[str, Any]:
    done = _command(*arguments, "--format", "json")
    try:
        answer = json.loads(done.stdout)
    except (json.JSONDecodeError, RecursionError):
        answer = {"success": False, "error-message": (done.stdout + done.stderr).strip()}
    if not isinstance(answer, dict) or not answer.get("success", False):
        reason = answer.get("error-message") or answer.get("error_message") if isinstance(answer, dict) else answer
        raise ValueError(
            f"`flwr {arguments[0]}` failed: {printable(reason or answer)} (is a SuperLink running, and does "
            f"{_flwr_home()}/config.toml name it? `python -m server start` writes it)"
        )
    return answer


def _flwr_home() -> Path:
    return Path(os.environ.get("FLWR_HOME", Path.home() / ".flwr"))


def _log_tail(connection: str, run_id: str, lines: int = 4) -> str:
    """The last lines of the run's log, in one."""
    done = _command("log", run_id, connection, "--show")
    said = [printable(line) for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    return "its log ends with: " + " | ".join(said[-lines:])


def _command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """In a session of its own, so that Ctrl-C here does not end it; without colours."""
    paths = os.pathsep.join([str(CHECKOUT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "NO_COLOR": "1", "TERM": "dumb", "PYTHONPATH": paths}
    return subprocess.run(
        [sys.executable, "-m", "server.backends.submit", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
        start_new_session=True,
        stdin=subprocess.DEVNULL,
    )
