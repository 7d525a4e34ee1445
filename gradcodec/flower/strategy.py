"""``Coded`` around a strategy, ``CodedFedAvg`` in place of ``FedAvg``: what goes out and comes back is codes.

The strategy inside sees arrays, as without them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Result, Strategy

from gradcodec.errors import CodecError
from gradcodec.flower.server import CodedRounds
from gradcodec.flower.wrapping import WrappingStrategy
from gradcodec.settings import CodecSettings


class _CodesStrategy(Strategy):
    """What both have in common: the calls that messages pass through, before and after whoever is behind."""

    coding: CodedRounds

    def start(self, *args: Any, **kwargs: Any) -> Result:
        """As Flower's; every call is a run of its own."""
        self.coding.begin()
        return super().start(*args, **kwargs)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Its messages, coded."""
        messages = super().configure_train(server_round, arrays, config, grid)  # type: ignore[safe-super]
        return self.coding.outgoing(messages, arrays, server_round, grid.get_node_ids())

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Its arrays as all clients will come to hold them, and its metrics."""
        decoded = list(self.coding.decoded(replies))
        arrays, metrics = super().aggregate_train(server_round, decoded)  # type: ignore[safe-super]
        return (None if arrays is None else self.coding.settle(arrays)), metrics

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Its messages, coded."""
        messages = super().configure_evaluate(server_round, arrays, config, grid)  # type: ignore[safe-super]
        return self.coding.outgoing(messages, arrays, server_round, grid.get_node_ids())

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Its metrics."""
        return super().aggregate_evaluate(server_round, list(self.coding.heard(replies)))  # type: ignore[safe-super]


class Coded(_CodesStrategy, WrappingStrategy):
    """Any strategy of Flower's Message API whose messages hold one record of arrays, with codes both ways.

    The strategy inside gets replies with the arrays that clients came to, as nearly as the bytes allow: whatever it
    makes of them, it makes as before.
    """

    def __init__(
        self, inner: Strategy, bits: float = 0.5, down_bits: float = 0.5, codec: str = "learned", **settings: Any
    ) -> None:
        """
        Args:
            inner: the strategy.
            bits: of a reply's payload, a parameter, at most.
            down_bits: of a round's step to the clients, a parameter, at most.
            codec: by its name.
            settings: others of ``gradcodec.CodecSettings``: ``feedback``, ``artifact``, ``options``.

        Raises:
            CodecError: there is no such codec, a setting is out of range, or the strategy has a ``start`` of its own,
                which nobody would call: derive it from ``CodedFedAvg``.
        """
        if type(inner).start is not Strategy.start:
            raise CodecError(f"{type(inner).__name__} has a start() of its own: derive it from CodedFedAvg instead")
        super().__init__(inner)
        self.coding = CodedRounds(CodecSettings(name=codec, bits=bits, down_bits=down_bits, **settings))


class CodedFedAvg(_CodesStrategy, FedAvg):
    """``FedAvg`` with codes both ways, to be put in its place, also as a base class: what is behind ``super()`` in a
    strategy of one's own gives and takes coded messages, and a meter in it counts those."""

    def __init__(
        self, *args: Any, bits: float = 0.5, down_bits: float = 0.5, codec: str = "learned", **kwargs: Any
    ) -> None:
        """
        Args:
            args: of ``FedAvg``.
            bits: of a reply's payload, a parameter, at most.
            down_bits: of a round's step to the clients, a parameter, at most.
            codec: by its name.
            kwargs: ``feedback``, ``artifact`` and ``options`` as of ``Coded``; all others are ``FedAvg``'s.

        Raises:
            CodecError: there is no such codec, or a setting is out of range.
        """
        settings = {key: kwargs.pop(key) for key in ("feedback", "artifact", "options") if key in kwargs}
        super().__init__(*args, **kwargs)
        self.coding = CodedRounds(CodecSettings(name=codec, bits=bits, down_bits=down_bits, **settings))
