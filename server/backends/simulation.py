"""The back end ``simulation``: Flower's own engine (Ray) runs both apps on this machine."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from flwr.app import Context, Message
from flwr.server.superlink.fleet.vce.backend.raybackend import RayBackend
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation

from conf.schema import Settings
from server.backends.local import clients_here
from server.quiet import ENGINE_LOG
from server.records.events import EventLog
from server.records.results import RunResults
from server.run.federation import run_federation

LAST_SECONDS = 2.0


def run_in_simulation(settings: Settings) -> RunResults:
    """Runs all rounds with one virtual node a client.

    Raises:
        ValueError: as ``run_federation`` does.
        KeyboardInterrupt: the user ended it; the run's log says so.
    """
    output = Path(settings.output)
    client_app = clients_here(settings)
    ended: list[RunResults | Exception] = []
    stopped, left = threading.Event(), threading.Event()
    server_app = ServerApp()

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        try:
            ended.append(run_federation(_until(stopped, grid), settings))
        except KeyboardInterrupt:
            pass
        except Exception as error:  # Flower would print its traceback and raise another
            ended.append(error)
        finally:
            left.set()

    resources: dict[str, Any] = {"num_cpus": settings.backend.client_cpus, "num_gpus": settings.backend.client_gpus}
    try:
        with _interrupting(stopped):
            run_simulation(
                server_app,
                client_app,
                settings.federation.num_clients,
                backend_config={
                    "client_resources": resources,
                    "init_args": {
                        "num_cpus": os.cpu_count() or 1,
                        "include_dashboard": False,
                        "log_to_driver": False,
                        "logging_level": "error",
                    },
                },
            )
    except KeyboardInterrupt:
        stopped.set()  # where another handler than ours took the signal
        left.wait(LAST_SECONDS)  # it may be evaluating, and nobody waits for that
        EventLog(output, keep=True).write("run_stopped")
        raise
    except RuntimeError as error:  # Flower's engine; what the run itself raised comes first
        ended.append(ValueError(f"the simulation crashed: {error}; {output / ENGINE_LOG} has its log"))
    if not ended:
        raise ValueError(f"the simulation ended before its last round; {output / ENGINE_LOG} has its log")
    if isinstance(ended[0], Exception):
        raise ended[0]
    return ended[0]


def _until(stopped: threading.Event, grid: Grid) -> Grid:
    """The same grid; once the run is stopped, whoever waits for replies that will not come is interrupted, too."""
    pull = grid.pull_messages

    def pull_messages(message_ids: Iterable[str]) -> Iterable[Message]:
        if stopped.is_set():
            raise KeyboardInterrupt
        return pull(message_ids)

    grid.pull_messages = pull_messages  # type: ignore[method-assign]
    return grid


@contextmanager
def _interrupting(stopped: threading.Event) -> Iterator[None]:
    """Ctrl-C is noted before it interrupts the engine, which then leaves Ray as it is: shut down under threads that use
    it, Ray ends this process at once. It ends with this process."""

    def interrupt(signum: int, frame: FrameType | None) -> None:
        stopped.set()
        raise KeyboardInterrupt

    def terminate_unless_stopped(self: RayBackend) -> None:
        if not stopped.is_set():
            terminate(self)

    terminate, before = RayBackend.terminate, signal.getsignal(signal.SIGINT)
    RayBackend.terminate = terminate_unless_stopped  # type: ignore[method-assign]
    if before is signal.default_int_handler:  # nobody else cares, and this is the main thread
        signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        RayBackend.terminate = terminate  # type: ignore[method-assign]
        if before is signal.default_int_handler:
            signal.signal(signal.SIGINT, before)
