"""What came over the wire and was used: one entry a client and round, counted from the arrays as they arrived."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from flwr.app import ArrayRecord, Message, MetricRecord
from flwr.serverapp.strategy import Strategy

from gradcodec.exchange import digest_of
from strategies.records import ARRAYS, METRICS, PARTITION, SECONDS_ENCODE, SECONDS_TRAIN, TRAIN_LOSS, metric
from strategies.wrapping import WrappingStrategy


@dataclass(frozen=True)
class Uplink:
    """What one client sent in one round."""

    server_round: int
    partition: int
    payload_bytes: int
    payload_digest: str
    train_loss: float
    seconds_train: float
    seconds_encode: float


class LedgerStrategy(WrappingStrategy):
    """Calls ``on_uplink`` for every reply that the inner strategy did not refuse."""

    def __init__(self, inner: Strategy, on_uplink: Callable[[Uplink], None], is_refused: Callable[[int], bool]) -> None:
        """``is_refused``: whether this partition's reply of the current round turned out to be of no use."""
        super().__init__(inner)
        self.on_uplink = on_uplink
        self.is_refused = is_refused

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        return super().aggregate_train(server_round, self._entered(server_round, replies))

    def _entered(self, server_round: int, replies: Iterable[Message]) -> Iterator[Message]:
        for reply in replies:
            uplink = _uplink_of(server_round, reply)  # now: the inner strategy uses the reply up
            yield reply
            if not self.is_refused(uplink.partition):
                self.on_uplink(uplink)


def _uplink_of(server_round: int, reply: Message) -> Uplink:
    arrays, metrics = reply.content.array_records[ARRAYS], reply.content.metric_records[METRICS]
    data = [arrays[name].data for name in sorted(arrays)]
    return Uplink(
        server_round,
        int(metric(metrics, PARTITION)),
        sum(map(len, data)),
        digest_of(b"".join(data)),
        metric(metrics, TRAIN_LOSS),
        metric(metrics, SECONDS_TRAIN),
        metric(metrics, SECONDS_ENCODE),
    )
