"""What a run notes as it goes: in its results, in its event log and on the screen."""

from __future__ import annotations

import dataclasses
import time
from logging import WARNING
from types import TracebackType
from typing import Any

from flwr.supercore import log

from server.events import EventLog
from server.progress import bytes_text, progress_bar
from server.results import NodeRefusal, RunResults
from strategies.outcomes import Fault, Uplink


class Journal:
    """The observer of a run's strategies, and its clock. To be entered while the run lasts."""

    def __init__(self, results: RunResults, events: EventLog) -> None:
        self.results = results
        self._events = events
        self._started = time.monotonic() - results.seconds
        self._progress = progress_bar()
        federation = results.settings.federation
        self._bar = self._progress.add_task(
            "waiting for clients", total=federation.rounds * federation.clients_per_round, note=""
        )

    def __enter__(self) -> Journal:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def event(self, event: str, **fields: Any) -> None:
        """A line of the event log. A full disk costs the line, not the run."""
        try:
            self._events.write(event, **fields)
        except OSError as error:
            log(WARNING, "the event %s is not logged: %s", event, error)

    def waiting(self, num_nodes: int) -> None:
        """Nodes are missing at the roll call."""
        wanted = self.results.settings.federation.num_clients
        self._progress.update(self._bar, description=f"waiting for clients: {num_nodes} of {wanted}")

    def round_started(self, server_round: int, num_clients: int, num_bytes: int) -> None:
        self.results.downlink_bytes += num_bytes
        self.event("round_started", server_round=server_round, clients=num_clients, bytes_down=num_bytes)

    def round_finished(self, server_round: int, uplinks: list[Uplink]) -> None:
        """``uplinks``: what it is made of."""
        self.results.uplinks += uplinks
        self._tick()
        self.event("round_finished", server_round=server_round)

    def evaluated(self, server_round: int, loss: float) -> None:
        self.results.heldout_loss.append(loss)
        self._tick()
        self.event("evaluated", server_round=server_round, heldout_loss=loss)
        size = self.results.payload_bytes_per_client_round
        sent = f"{bytes_text(size)} a client and round, " if server_round else ""
        done = server_round * self.results.settings.federation.clients_per_round
        self._progress.update(
            self._bar,
            completed=done,
            description=f"{self.results.settings.arm}, round {server_round}",
            note=f"{sent}loss {loss:.3f}",
        )

    def uplink(self, uplink: Uplink) -> None:
        self.event("uplink", **dataclasses.asdict(uplink))
        self._progress.update(self._bar, advance=1)

    def fault(self, fault: Fault) -> None:
        self.results.faults.append(fault)
        self.event("fault", **dataclasses.asdict(fault))

    def node_refused(self, node: int, reason: str) -> None:
        self.results.refused_nodes.append(NodeRefusal(node, reason))
        self.event("node_refused", node=node, reason=reason)

    def _tick(self) -> None:
        self.results.seconds = time.monotonic() - self._started
