"""The weighted mean of replies, one reply at a time: memory does not grow with the number of clients.

Flower's strategies keep all replies of a round until they average them. Those that make nothing of the replies but
their weighted mean (FedAvg, FedAvgM, FedAdam) get one reply from here, which is that mean.
"""

from __future__ import annotations

from collections.abc import Iterable

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
        metrics: dict[str, float] = {}
        examples, last = 0.0, None
        for reply in replies:
            said = reply.content.metric_records[METRICS]
            weight = metric(said, NUM_EXAMPLES)
            record = reply.content.array_records[ARRAYS]
            for name in list(record):  # used up, a tensor at a time: Flower's records are cycles, which live on
                tensor = torch.from_numpy(np.asarray(record.pop(name).numpy(), np.float32))
                sums.setdefault(name, torch.zeros_like(tensor)).add_(tensor, alpha=weight)
            for key in said:
                metrics[key] = metrics.get(key, 0.0) + weight * metric(said, key)
            examples += weight
            last = reply
        if last is None:
            return super().aggregate_train(server_round, [])
        for tensor in sums.values():
            tensor.div_(examples)
        mean = moved_to_record(sums)
        means = MetricRecord({key: value / examples for key, value in metrics.items()})
        means[NUM_EXAMPLES] = examples
        last.content = RecordDict({ARRAYS: mean, METRICS: means})
        try:
            return super().aggregate_train(server_round, [last])
        finally:
            mean.clear()
