"""Records every client's update: what TGAP (the paper, section 3.1) trains the codec on.

The file holds float32 tensors under ``r<round>/c<client>/<PEFT tensor name>``.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from flwr.app import ArrayRecord, Message, MetricRecord
from flwr.serverapp.strategy import Strategy
from safetensors.torch import save_file
from torch import Tensor

from strategies.records import ARRAYS, METRICS, PARTITION, metric
from strategies.tensors import from_record
from strategies.wrapping import AdapterStrategy


class RecordingStrategy(AdapterStrategy):
    """Keeps the dense updates of every round in memory until ``save``; for dense replies only."""

    def __init__(self, inner: Strategy) -> None:
        super().__init__(inner)
        self.updates: dict[str, Tensor] = {}

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        return super().aggregate_train(server_round, (self._recorded(server_round, reply) for reply in replies))

    def _recorded(self, server_round: int, reply: Message) -> Message:
        client = int(metric(reply.content.metric_records[METRICS], PARTITION))
        for name, tensor in from_record(reply.content.array_records[ARRAYS]).items():
            self.updates[f"r{server_round}/c{client}/{name}"] = tensor - self.current[name]
        return reply

    def save(self, path: Path) -> None:
        """Writes the file whole or not at all."""
        part = path.with_name(path.name + ".part")
        save_file(self.updates, part)
        os.replace(part, path)
