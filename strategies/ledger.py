"""What came over the wire: one entry a client and round, counted from the arrays as they arrived."""

from __future__ import annotations

from collections.abc import Callable, Iterable
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
    """Keeps account of every reply in ``uplinks`` and calls ``on_uplink`` for each."""

    def __init__(self, inner: Strategy, on_uplink: Callable[[Uplink], None] | None = None) -> None:
        super().__init__(inner)
        self.uplinks: list[Uplink] = []
        self.on_uplink = on_uplink

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        return super().aggregate_train(server_round, (self._entered(server_round, reply) for reply in replies))

    def _entered(self, server_round: int, reply: Message) -> Message:
        arrays, metrics = reply.content.array_records[ARRAYS], reply.content.metric_records[METRICS]
        data = [arrays[name].data for name in sorted(arrays)]
        uplink = Uplink(
            server_round,
            int(metric(metrics, PARTITION)),
            sum(map(len, data)),
            digest_of(b"".join(data)),
            metric(metrics, TRAIN_LOSS),
            metric(metrics, SECONDS_TRAIN),
            metric(metrics, SECONDS_ENCODE),
        )
        self.uplinks.append(uplink)
        if self.on_uplink is not None:
            self.on_uplink(uplink)
        return reply
