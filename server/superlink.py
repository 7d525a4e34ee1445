"""The back end ``superlink``: hands the run to a running SuperLink and follows it to its end.

The ServerApp writes its results on the SuperLink's host, into the run's ``output``. The run's status is taken from
the engine: ``flwr run --stream`` exits 0 even when a run fails.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.progress import Progress, TaskID

from conf.schema import Settings
from server.events import read_status
from server.progress import progress_bar
from server.results import RunResults, load_results

APP_FOLDER = Path(__file__).resolve().parents[1]
POLL_SECONDS = 2.0
PATIENCE_SECONDS = 300.0
"""How long a SuperLink may be silent before the run is given up here; it goes on there."""


def run_on_superlink(settings: Settings) -> RunResults:
    """Submits the run and waits for it.

    Raises:
        ValueError: no SuperLink under that name, or the run failed; the message has the engine's reason.
    """
    connection = settings.backend.connection
    if not (_flwr_home() / "config.toml").is_file():  # Flower would make one, of servers that are not ours
        raise ValueError(
            f"backend.connection={connection!r} is not known: {_flwr_home()} names no SuperLink. Set FLWR_HOME to the "
            "folder `flwr` of a running one, as `python -m server start` prints it"
        )
    with tempfile.TemporaryDirectory() as folder:
        overrides = Path(folder) / "run.toml"
        overrides.write_text(f"settings = {json.dumps(settings.to_json())}\n")  # a JSON string is a TOML string
        run_id = _flwr("run", str(APP_FOLDER), connection, "--run-config", str(overrides)).get("run-id")
    if run_id is None:
        raise ValueError(f"SuperLink {connection!r} gave no run id")
    expected = settings.federation.rounds * settings.federation.clients_per_round
    with progress_bar() as progress:
        bar = progress.add_task(f"run {run_id} on {connection}", total=expected, note="")
        status, answered = "", time.monotonic()
        while not status.startswith("finished"):
            try:
                status, answered = _status(connection, str(run_id)), time.monotonic()
            except ValueError:  # a SuperLink that was killed comes back, and the run with it
                if time.monotonic() - answered > PATIENCE_SECONDS:
                    raise
                status = "the SuperLink does not answer"
            _show(progress, bar, f"run {run_id}: {status}", Path(settings.output))
            time.sleep(POLL_SECONDS)
        _show(progress, bar, f"run {run_id}: {status}", Path(settings.output))
    if status != "finished:completed":
        log = _log_tail(connection, str(run_id))
        raise ValueError(f"run {run_id} ended with {status}; its log ends with:\n{log}")
    return load_results(Path(settings.output) / "results.json", settings)


def _status(connection: str, run_id: str) -> str:
    runs = _flwr("list", connection, "--run-id", run_id).get("runs") or []
    if not runs:
        raise ValueError(f"SuperLink {connection!r} does not know run {run_id} any more")
    return str(runs[0]["status"])


def _show(progress: Progress, bar: TaskID, description: str, output: Path) -> None:
    """What the server app has noted in its event log, where its disk is this one."""
    try:
        status = read_status(output)
    except ValueError:
        progress.update(bar, description=description)
        return
    note = f"round {status.server_round}, loss {status.heldout_loss[-1]:.3f}" if status.heldout_loss else ""
    progress.update(bar, description=description, completed=status.uplinks, note=note)


def _flwr(*arguments: str) -> dict[str, Any]:
    done = _command(*arguments, "--format", "json")
    try:
        answer = json.loads(done.stdout)
    except json.JSONDecodeError:
        answer = {"success": False, "error-message": (done.stdout + done.stderr).strip()}
    if not answer.get("success", False):
        reason = answer.get("error-message") or answer.get("error_message") or answer
        raise ValueError(
            f"`flwr {arguments[0]}` failed: {reason}\n"
            f"(is a SuperLink running, and does {_flwr_home()}/config.toml name it? `python -m server start` writes it)"
        )
    assert isinstance(answer, dict)
    return answer


def _flwr_home() -> Path:
    return Path(os.environ.get("FLWR_HOME", Path.home() / ".flwr"))


def _log_tail(connection: str, run_id: str, lines: int = 12) -> str:
    done = _command("log", run_id, connection, "--show")
    return "\n".join((done.stdout + done.stderr).strip().splitlines()[-lines:])


def _command(*arguments: str) -> subprocess.CompletedProcess[str]:
    flwr = Path(sys.executable).with_name("flwr")
    return subprocess.run([str(flwr), *arguments], capture_output=True, text=True, timeout=120)
