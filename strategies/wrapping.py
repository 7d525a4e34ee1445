"""A strategy around a strategy: passes every call on, so that a subclass says only what it changes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from logging import WARNING

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from flwr.supercore import log
from torch import Tensor

from strategies.errors import RoundError
from strategies.records import ARRAYS, wrap_adapter
from strategies.tensors import from_record


class WrappingStrategy(Strategy):
    def __init__(self, inner: Strategy) -> None:
        self.inner = inner

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        return self.inner.configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        return self.inner.aggregate_train(server_round, replies)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        return self.inner.configure_evaluate(server_round, arrays, config, grid)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        return self.inner.aggregate_evaluate(server_round, replies)

    def summary(self) -> None:
        self.inner.summary()


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


class FacingClients(AdapterStrategy):
    """Between the wire and a strategy of dense Arrays: the adapter leaves in one Array, and replies may be refused."""

    def __init__(self, inner: Strategy, min_replies: int = 1) -> None:
        super().__init__(inner)
        self.min_replies = min_replies
        self.on_refused: Callable[[int, str], None] = lambda node, reason: None

    def enough(self, server_round: int, replies: Iterable[Message]) -> Iterator[Message]:
        """The replies, and behind the last one RoundError if they were too few: before anything is averaged."""
        count = 0
        for reply in replies:
            count += 1
            yield reply
        if count < self.min_replies:
            raise RoundError(
                f"round {server_round}: {count} usable replies, federation.min_replies={self.min_replies}; see above"
            )

    def refuse(self, node: int, reason: str) -> None:
        """A reply is left out; that never ends the run."""
        log(WARNING, "the reply of node %s is refused: %s", node, reason)
        self.on_refused(node, reason)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        messages = super().configure_train(server_round, arrays, config, grid)
        adapter = wrap_adapter({name: tensor.numpy() for name, tensor in self.current.items()})  # one for all
        for message in messages:
            message.content = RecordDict({**message.content, ARRAYS: adapter})
            yield message
