"""The weighted mean of replies, one reply at a time: memory does not grow with the number of clients.

Flower's strategies keep all replies of a round until they average them. Those that make nothing of the replies but
their weighted mean (FedAvg, FedAvgM, FedAdam) get one reply from here, which is that mean.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from torch import Tensor

from gradcodec.flower.wrapping import WrappingStrategy
from strategies.tensors import moved_to_record
from strategies.wire import ARRAYS, METRICS, NUM_EXAMPLES, metric


class MeanStrategy(WrappingStrategy):
    """Hands the inner strategy one reply a round: the mean of all, each weighted by its number of examples.

    The order of the replies decides the last bits of the sums; ``FederatedStrategy`` gives them in a fixed one.
    """

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        sums: dict[str, Tensor] = {}
        metrics: list[MetricRecord] = []
        last = None
        for reply in replies:
            said = reply.content.metric_records[METRICS]
            weight = metric(said, NUM_EXAMPLES)
            record = reply.content.array_records[ARRAYS]
            for name in list(record):  # used up, a tensor at a time: Flower's records are cycles, which live on
                tensor = torch.from_numpy(np.asarray(record.pop(name).numpy(), np.float32))
                sums.setdefault(name, torch.zeros_like(tensor)).add_(tensor, alpha=weight)
            metrics.append(said)
            last = reply
        if last is None:
            return super().aggregate_train(server_round, [])
        means = mean_metrics(metrics)
        for tensor in sums.values():
            tensor.div_(metric(means, NUM_EXAMPLES))
        mean = moved_to_record(sums)
        last.content = RecordDict({ARRAYS: mean, METRICS: means})
        try:
            return super().aggregate_train(server_round, [last])
        finally:
            mean.clear()


def mean_metrics(records: Sequence[MetricRecord]) -> MetricRecord:
    """The means of what the replies say, weighted by the numbers of examples, of which it holds the sum; all of them
    have the keys of the first."""
    examples = sum(metric(record, NUM_EXAMPLES) for record in records)
    sums = {key: sum(metric(one, NUM_EXAMPLES) * metric(one, key) for one in records) for key in records[0]}
    means = MetricRecord({key: value / examples for key, value in sums.items()})
    means[NUM_EXAMPLES] = examples
    return means
