"""A strategy around a strategy that remembers the adapter of its round."""

from __future__ import annotations

from collections.abc import Iterable

from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from gradcodec.flower.wrapping import WrappingStrategy
from strategies.tensors import from_record


class AdapterStrategy(WrappingStrategy):
    """Keeps the adapter that the round started from in ``current``: what a reply is checked against or added to."""

    def __init__(self, inner: Strategy) -> None:
        super().__init__(inner)
        self.current: dict[str, Tensor] = {}

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        self.current = from_record(arrays)
        return super().configure_train(server_round, arrays, config, grid)
