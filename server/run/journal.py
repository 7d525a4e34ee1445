"""What a run notes as it goes: in its results and in its event log, from which it is shown."""

from __future__ import annotations

import dataclasses
import time
from logging import WARNING
from typing import Any

from flwr.supercore import log

from conf.output import OutputError
from server.records.events import EventLog
from server.records.node_losses import federated_losses
from server.records.results import NodeRefusal, RunResults
from strategies.outcomes import Downlink, Fault, NodeLoss, Uplink


class Journal:
    """The observer of a run's strategies, and its clock."""

    def __init__(self, results: RunResults, events: EventLog) -> None:
        self.results = results
        self._events = events
        self._started = time.monotonic() - results.seconds
        self._here = -1  # nodes, as long as some are waited for

    def event(self, event: str, **fields: Any) -> None:
        """A line of the event log. A full disk costs the line, not the run."""
        try:
            self._events.write(event, **fields)
        except OutputError as error:
            log(WARNING, "the event %s is not logged: %s", event, error)

    def waiting(self, num_nodes: int) -> None:
        """Nodes are missing at the roll call."""
        if num_nodes != self._here:
            self._here = num_nodes
            self.event("waiting", count=num_nodes, of=self.results.settings.federation.num_clients)

    def round_started(self, server_round: int, num_clients: int) -> None:
        self.event("round_started", server_round=server_round, clients=num_clients)

    def round_finished(self, server_round: int, uplinks: list[Uplink]) -> None:
        """``uplinks``: what it is made of."""
        self.results.uplinks += uplinks
        self._tick()
        self.event("round_finished", server_round=server_round)

    def evaluated(self, server_round: int, loss: float) -> None:
        self.results.heldout_loss.append(loss)
        self._tick()
        self.event("evaluated", server_round=server_round, heldout_loss=loss)

    def evaluated_on_nodes(self, server_round: int, asked: int, losses: list[NodeLoss]) -> None:
        """``losses``: what nodes said, none of it if they are too few."""
        self.results.node_losses += losses
        self._tick()
        found = federated_losses([*(one for one in self.results.node_losses if not one.server_round), *losses])
        said = {key: value for key, value in found[-1].to_json().items() if key != "by_client"} if losses else {}
        self.event(
            "evaluated_on_nodes", **{**said, "server_round": server_round, "asked": asked, "clients": len(losses)}
        )

    def uplink(self, uplink: Uplink) -> None:
        self.event("uplink", **dataclasses.asdict(uplink))

    def downlink(self, downlink: Downlink) -> None:
        self.results.downlinks.append(downlink)
        self.event("downlink", **dataclasses.asdict(downlink))

    def fault(self, fault: Fault) -> None:
        self.results.faults.append(fault)
        self.event("fault", **dataclasses.asdict(fault))

    def node_refused(self, node: int, reason: str) -> None:
        self.results.refused_nodes.append(NodeRefusal(node, reason))
        self.event("node_refused", node=node, reason=reason)

    def _tick(self) -> None:
        self.results.seconds = time.monotonic() - self._started
