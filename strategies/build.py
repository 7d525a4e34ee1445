"""Settings -> strategy."""

from __future__ import annotations

from flwr.serverapp.strategy import FedAdam, FedAvg, FedAvgM, FedMedian, FedTrimmedAvg, Strategy

from strategies.mean import MeanStrategy
from strategies.settings import OF_THE_MEAN, StrategySettings, check_strategy
from strategies.wire import ARRAYS, CONFIG, NUM_EXAMPLES


def build_inner(settings: StrategySettings) -> Strategy:
    """Flower's own strategy, behind ``MeanStrategy`` where the mean is all that it needs."""
    strategy = build_flower(settings)
    return MeanStrategy(strategy) if settings.name in OF_THE_MEAN else strategy


def build_flower(settings: StrategySettings) -> Strategy:
    """Flower's own strategy. It takes every node that it is shown; which ones is ``FederatedStrategy``'s business."""
    check_strategy(settings)
    common = {
        "fraction_train": 1.0,
        "fraction_evaluate": 0.0,
        "min_train_nodes": 1,
        "min_available_nodes": 1,
        "weighted_by_key": NUM_EXAMPLES,
        "arrayrecord_key": ARRAYS,
        "configrecord_key": CONFIG,
    }
    if settings.name == "fedadam":
        moments = {"beta_1": settings.momentum, "beta_2": settings.beta_2, "tau": settings.tau}
        return FedAdam(eta=settings.lr, **moments, **common)  # type: ignore[arg-type]
    if settings.name == "fedavgm" or (settings.name == "fedavg" and settings.lr != 1.0):
        momentum = settings.momentum if settings.name == "fedavgm" else 0.0
        return FedAvgM(server_learning_rate=settings.lr, server_momentum=momentum, **common)  # type: ignore[arg-type]
    kinds = {"fedavg": FedAvg, "fedmedian": FedMedian, "fedtrimmedavg": FedTrimmedAvg}
    return kinds[settings.name](**common)  # type: ignore[arg-type]
