"""Records every client's update: what TGAP (the paper, section 3.1) trains the codec on."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from flwr.app import ArrayRecord, Message, MetricRecord
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from gradcodec.layout import Layout
from gradcodec.training.recording import save_recording
from strategies.tensors import from_record
from strategies.wire import ARRAYS, METRICS, PARTITION, metric
from strategies.wrapping import AdapterStrategy


class RecordingStrategy(AdapterStrategy):
    """Keeps the dense updates of every round in memory until ``save``; for dense replies only."""

    def __init__(self, inner: Strategy, layout: Layout) -> None:
        super().__init__(inner)
        self.layout = layout
        self.updates: dict[tuple[int, int], dict[str, Tensor]] = {}

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        return super().aggregate_train(server_round, (self._recorded(server_round, reply) for reply in replies))

    def _recorded(self, server_round: int, reply: Message) -> Message:
        client = int(metric(reply.content.metric_records[METRICS], PARTITION))
        adapter = from_record(reply.content.array_records[ARRAYS])
        self.updates[server_round, client] = {name: tensor - self.current[name] for name, tensor in adapter.items()}
        return reply

    def save(self, path: Path) -> None:
        """Writes the file whole or not at all."""
        save_recording(self.updates, self.layout.parts, path)
