"""Strategies that bear malicious clients: a rule of ``rules.py`` over the updates of a round, as a Flower strategy.

Flower has Krum, MultiKrum, Bulyan, FedMedian and FedTrimmedAvg, and none of them is used here; what they do differently
is held in ``tests/test_robust.py``:

- Krum, MultiKrum and Bulyan take distances between whole adapters, in float32, as a difference of sums of squares. What
  clients share is far longer than what they differ in, so from the first rounds on the distances are rounding, some of
  them below zero, and the choice is chance. Here they are taken between updates, in float64.
- MultiKrum weights what it has chosen by the number of examples that each claims: one attacker among the chosen who
  claims a million is the aggregate. Here all that are chosen count the same.
- Krum with too few replies looks at one neighbour and goes on. Here the round comes to nothing.
- Bulyan takes the best of one Krum ranking, where the paper has Krum choose anew among those that are left.
- FedTrimmedAvg cuts a share, rounded down: with one in five malicious and one of ten replies lost, one value is cut on
  each side and not two. Here it is rounded up. FedMedian does the same as here, without a check of how many came.

All replies of a round are kept, as one float32 copy of each update; the mean of ``mean.py`` keeps none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from numpy.typing import NDArray
from torch import Tensor

from strategies import rules
from strategies.errors import RoundError
from strategies.mean import mean_metrics
from strategies.settings import StrategySettings, num_malicious, too_few
from strategies.tensors import from_record, moved_to_record
from strategies.wire import ARRAYS, METRICS

RootUpdate = Callable[[int, Mapping[str, Tensor]], Mapping[str, Tensor]]
"""For FLTrust: the round's number and the adapter that it starts from -> what the server's own training on a small,
clean set of data changes of it, with the same names and shapes, float32 on the CPU. Called once a round, when its
replies have come."""

_CENTRE = "centre"


class RobustStrategy(FedAvg):
    """The adapter of the round, plus ``lr`` times what the rule makes of its updates.

    It follows ``strategies.optimizer.Remembers``: centred clipping goes on from the last round's aggregate.
    """

    def __init__(self, settings: StrategySettings, root: RootUpdate | None = None, **common: Any) -> None:
        """``common`` is for Flower's FedAvg, which says whom to ask. ``root`` is needed by FLTrust alone."""
        super().__init__(**common)
        self.settings = settings
        self.root = root
        self.centre_D: Tensor | None = None
        self.current: dict[str, Tensor] = {}

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        self.current = from_record(arrays)
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The next adapter.

        Raises:
            RoundError: too few replies for the rule and what it is to withstand, or, with FLTrust, none that goes the
                server's own way. Nothing has changed.
        """
        updates, metrics = [], []
        for reply in replies:
            updates.append(self._update_of(reply.content.array_records[ARRAYS]))
            metrics.append(reply.content.metric_records[METRICS])
        if reason := too_few(self.settings, len(updates)) or ("" if updates else "there are no replies"):
            raise RoundError(f"round {server_round}: {reason} that can be used")
        aggregate_D = self._aggregate(server_round, updates)
        adapter, start = {}, 0
        for name, tensor in self.current.items():
            step = aggregate_D[start : start + tensor.numel()].view(tensor.shape)
            adapter[name], start = tensor.add(step, alpha=self.settings.lr), start + tensor.numel()
        return moved_to_record(adapter), mean_metrics(metrics)

    def state_arrays(self) -> dict[str, NDArray[Any]]:
        return {} if self.centre_D is None else {_CENTRE: self.centre_D.numpy()}

    def load_state_arrays(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        self.centre_D = torch.from_numpy(arrays[_CENTRE]) if arrays else None

    def _update_of(self, record: ArrayRecord) -> Tensor:
        """``[D]`` float32, the tensors in the order of the adapter's. The record is used up."""
        update_D = torch.empty(sum(tensor.numel() for tensor in self.current.values()))
        start = 0
        for name, tensor in self.current.items():
            array = torch.from_numpy(np.asarray(record.pop(name).numpy(), np.float32))
            torch.sub(array.flatten(), tensor.flatten(), out=update_D[start : start + tensor.numel()])
            start += tensor.numel()
        return update_D

    def _aggregate(self, server_round: int, updates: list[Tensor]) -> Tensor:
        f, name = num_malicious(self.settings, len(updates)), self.settings.name
        if name == "fltrust":
            return self._trusted(server_round, updates)
        if name == "centredclip":
            return self._clipped(updates)
        by_coordinate: dict[str, Callable[[], Tensor]] = {
            "fedmedian": lambda: rules.median(updates),
            "fedtrimmedavg": lambda: rules.trimmed_mean(updates, f),
            "bulyan": lambda: rules.bulyan(updates, f),
        }
        if name in by_coordinate:
            return by_coordinate[name]()
        gram_NN = rules.gram(updates)
        by_distance: dict[str, Callable[[], Tensor]] = {
            "krum": lambda: rules.krum(gram_NN, f),
            "multikrum": lambda: rules.multikrum(gram_NN, f),
            "rfa": lambda: rules.geometric_median(gram_NN),
        }
        return rules.combined(updates, by_distance[name]())

    def _clipped(self, updates: list[Tensor]) -> Tensor:
        """Around the last round's aggregate, in the first round around no change. The updates are used up.

        Departures from the paper: clients send no momentum, as most are asked in few rounds, so that the memory is the
        server's centre alone; and the radius is relative.
        """
        centre_D = self.centre_D if self.centre_D is not None else torch.zeros_like(updates[0])
        for update_D in updates:
            update_D.sub_(centre_D)
        self.centre_D = rules.combined(updates, rules.centred_clip(rules.gram(updates), None)).add_(centre_D)
        return self.centre_D

    def _trusted(self, server_round: int, updates: list[Tensor]) -> Tensor:
        assert self.root is not None, "build_flower refuses this"
        own = self.root(server_round, self.current)
        updates = [*updates, torch.cat([own[name].float().flatten() for name in self.current])]
        weights_N = rules.trust(rules.gram(updates))
        if weights_N is None:
            raise RoundError(
                f"round {server_round}: none of {len(updates) - 1} updates has a part in the direction of the server's "
                "own: are its data of the clients' kind?"
            )
        return rules.combined(updates, weights_N)
