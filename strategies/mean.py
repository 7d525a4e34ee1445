"""The weighted mean of replies, one reply at a time: memory does not grow with the number of clients.

Flower's strategies keep all replies of a round until they average them. Those that make nothing of the replies but
their weighted mean (FedAvg, FedAvgM, FedAdam) get one reply from here, which is that mean.

Where clients train lower ranks than the adapter has, few of them may train a row. In a mean over all it would hardly
move; the mean over those few is longer than other rows' steps, as less of it cancels out, and overshoots
(docs/negative-results.md). Its step is that mean times the root of their share of the weight: as long as other rows' if
what clients send has little in common. (Cho et al. 2024, "Heterogeneous LoRA for Federated Fine-tuning of On-Device
Foundation Models", weigh whole clients by their norms instead.)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from gradcodec.flower.wrapping import WrappingStrategy
from gradcodec.layout import rank_first
from strategies.tensors import from_record, moved_to_record
from strategies.wire import ARRAYS, CONFIG, METRICS, NUM_EXAMPLES, RANK, metric


class MeanStrategy(WrappingStrategy):
    """Hands the inner strategy one reply a round: the mean of all, each weighted by its number of examples.

    A reply whose config has ``RANK`` counts in the first so many rows of every factor; in the others it must hold what
    the round started from. Rows that nobody trains stay as they are.

    The order of the replies decides the last bits of the sums; ``FederatedStrategy`` gives them in a fixed one.
    """

    def __init__(self, inner: Strategy) -> None:
        super().__init__(inner)
        self._start = ArrayRecord()  # the adapter of the round: unpacked where replies say ranks, and let go with it

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        self._start = arrays
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        start, self._start = self._start, ArrayRecord()
        sums: dict[str, Tensor] = {}
        metrics: list[MetricRecord] = []
        ranks: dict[int, float] = {}  # rank -> weight of those who trained no more
        last = None
        for reply in replies:
            said = reply.content.metric_records[METRICS]
            weight = metric(said, NUM_EXAMPLES)
            record = reply.content.array_records[ARRAYS]
            for name in list(record):  # used up, a tensor at a time: Flower's records are cycles, which live on
                tensor = torch.from_numpy(np.asarray(record.pop(name).numpy(), np.float32))
                sums.setdefault(name, torch.zeros_like(tensor)).add_(tensor, alpha=weight)
            metrics.append(said)
            if (rank := _rank_of(reply)) is not None:
                ranks[rank] = ranks.get(rank, 0.0) + weight
            last = reply
        if last is None:
            return super().aggregate_train(server_round, [])
        means = mean_metrics(metrics)
        for tensor in sums.values():
            tensor.div_(metric(means, NUM_EXAMPLES))
        if ranks:
            _weigh_rows(sums, from_record(start), ranks, metric(means, NUM_EXAMPLES))
        mean = moved_to_record(sums)
        last.content = RecordDict({ARRAYS: mean, METRICS: means})
        try:
            return super().aggregate_train(server_round, [last])
        finally:
            mean.clear()


def _rank_of(reply: Message) -> int | None:
    config = reply.content.config_records.get(CONFIG)
    return None if config is None or RANK not in config else int(str(config[RANK]))


def _weigh_rows(
    mean: Mapping[str, Tensor], origin: Mapping[str, Tensor], weight_of_rank: Mapping[int, float], total: float
) -> None:
    """Means over all -> means over those who train a row, times the root of their share of the weight."""
    for name, tensor in mean.items():
        moved, from_ = rank_first(name, tensor), rank_first(name, origin[name])
        for row in range(min(weight_of_rank), len(moved)):
            weight = total - sum(less for rank, less in weight_of_rank.items() if rank <= row)
            factor = math.sqrt(total / weight) if weight > 1e-9 * total else 0.0
            moved[row] = from_[row] + (moved[row] - from_[row]) * factor


def mean_metrics(records: Sequence[MetricRecord]) -> MetricRecord:
    """The means of what the replies say, weighted by the numbers of examples, of which it holds the sum; all of them
    have the keys of the first."""
    examples = sum(metric(record, NUM_EXAMPLES) for record in records)
    sums = {key: sum(metric(one, NUM_EXAMPLES) * metric(one, key) for one in records) for key in records[0]}
    means = MetricRecord({key: value / examples for key, value in sums.items()})
    means[NUM_EXAMPLES] = examples
    return means
