"""A run's state as Prometheus text on a local port, by ``prometheus_client``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from server.records.events import EventLog, RunStatus


class RunCollector(Collector):
    """The figures of a run's status, as they are when Prometheus asks."""

    def __init__(self, status: RunStatus) -> None:
        self._status = status

    def collect(self) -> Iterator[Metric]:
        status = self._status
        yield GaugeMetricFamily("cgfedllm_rounds", "Rounds of the run", status.rounds)
        yield GaugeMetricFamily("cgfedllm_rounds_finished", "Rounds that are done", status.server_round)
        yield GaugeMetricFamily("cgfedllm_nodes", "Nodes on the roster", status.nodes)
        yield GaugeMetricFamily("cgfedllm_answers", "Replies in the current round", status.answers)
        if status.heldout_loss:
            yield GaugeMetricFamily("cgfedllm_heldout_loss_nats", "Nats per token", status.heldout_loss[-1])
        for loss in [*status.node_losses.values()][-1:]:
            yield GaugeMetricFamily("cgfedllm_federated_loss_nats", "Nats per token, on the nodes", loss)
        yield CounterMetricFamily("cgfedllm_uplink_payload_bytes", "Bytes of all payloads", status.payload_bytes)
        yield CounterMetricFamily("cgfedllm_downlink_array_bytes", "Bytes of arrays to clients", status.bytes_down)
        yield CounterMetricFamily("cgfedllm_uplinks", "Usable replies", status.uplinks)
        yield CounterMetricFamily("cgfedllm_faults", "Replies that were missing or unusable", status.faults)


@contextlib.contextmanager
def serve_metrics(port: int | None, events: EventLog) -> Iterator[None]:
    """Serves ``http://127.0.0.1:port/metrics`` while the block runs; None: nothing.

    Raises:
        ValueError: the port is taken.
    """
    if port is None:
        yield
        return
    status = RunStatus()
    events.listeners.append(status.add)
    registry = CollectorRegistry()
    registry.register(RunCollector(status))
    try:
        server, thread = start_http_server(port, addr="127.0.0.1", registry=registry)
    except OSError as error:
        raise ValueError(f"federation.metrics_port={port} cannot be served: {error.strerror}") from None
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)
