"""Federated averaging that keeps an account of what travels."""

from collections.abc import Iterable
from logging import getLogger

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

BUDGET_MB = 200_000


class FlowerTuneLlm(FedAvg):
    """FedAvg whose training messages pass a meter, both ways."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.comm_tracker = CommunicationTracker()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The round's messages, counted."""
        messages = super().configure_train(server_round, arrays, config, grid)
        self.comm_tracker.track(messages)
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Their mean; the replies are counted."""
        self.comm_tracker.track(replies)
        return super().aggregate_train(server_round, replies)


class CommunicationTracker:
    """Sums the megabytes (2**20 bytes) of array records, and warns beyond the budget."""

    def __init__(self):
        self.megabytes = 0.0

    def track(self, messages: Iterable[Message]) -> None:
        """Adds those of the messages."""
        contents = [message.content for message in messages if message.has_content()]
        added = sum(record.count_bytes() for one in contents for record in one.array_records.values()) / 2**20
        self.megabytes += added
        log = getLogger("flwr")
        log.info("Traffic: %.3f MB (+%.3f) of %s MB", self.megabytes, added, f"{BUDGET_MB:,}")
        if self.megabytes > BUDGET_MB:
            log.warning("The traffic is beyond its budget of %s MB", f"{BUDGET_MB:,}")
