"""The dense twin of ``coded.py``: replies are adapters in fp32 (LoRA-FT), checked before they are averaged."""

from __future__ import annotations

from collections.abc import Iterable
from logging import WARNING

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.supercore import log
from torch import Tensor

from strategies.records import ARRAYS, from_record
from strategies.wrapping import WrappingStrategy


class DenseStrategy(WrappingStrategy):
    """Leaves out, with a warning, every reply that is not an adapter like the one that was sent."""

    _current: dict[str, Tensor]

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        self._current = from_record(arrays)
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        return super().aggregate_train(server_round, [reply for reply in replies if self._fits(reply)])

    def _fits(self, reply: Message) -> bool:
        problem = self._problem(reply.content.array_records[ARRAYS])
        if problem:
            log(WARNING, "the adapter of node %s is refused: %s", reply.metadata.src_node_id, problem)
        return not problem

    def _problem(self, arrays: ArrayRecord) -> str:
        if arrays.keys() != self._current.keys():
            return "it has other tensors than the global one"
        try:
            adapter = from_record(arrays)
        except Exception as error:  # whatever NumPy makes of bytes that a stranger sent
            return f"its arrays cannot be read: {error}"
        for name, tensor in adapter.items():
            if tensor.shape != self._current[name].shape or not bool(torch.isfinite(tensor).all()):
                return f"tensor {name!r} has another shape, or holds NaN or infinity"
        return ""
