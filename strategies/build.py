"""Settings -> strategy."""

from __future__ import annotations

import math
from dataclasses import dataclass

from flwr.serverapp.strategy import FedAdam, FedAvg, FedAvgM, FedMedian, FedTrimmedAvg, Strategy

from strategies.mean import MeanStrategy
from strategies.records import ARRAYS, CONFIG, NUM_EXAMPLES
from strategies.wrapping import FederationError


@dataclass
class StrategySettings:
    """How the server turns the clients' updates into the next adapter."""

    name: str = "fedavg"  # fedavg | fedavgm | fedadam | fedmedian | fedtrimmedavg
    lr: float = 1.0  # of the server: fedavg, fedavgm, fedadam
    momentum: float = 0.9  # fedavgm; beta_1 of fedadam
    beta_2: float = 0.99  # fedadam
    tau: float = 1e-4  # fedadam: added to the root of the second moment


STRATEGIES = ("fedavg", "fedavgm", "fedadam", "fedmedian", "fedtrimmedavg")


def check_strategy(settings: StrategySettings) -> None:
    """Raises ValueError naming the first key that cannot be served."""
    if settings.name not in STRATEGIES:
        raise FederationError(f"strategy.name={settings.name!r} is none of {', '.join(STRATEGIES)}")
    if not (settings.lr > 0 and math.isfinite(settings.lr)):
        raise FederationError(f"strategy.lr={settings.lr} must be greater than 0")
    for key in ("momentum", "beta_2"):
        if not 0 <= getattr(settings, key) < 1:
            raise FederationError(f"strategy.{key}={getattr(settings, key)} must be at least 0 and less than 1")
    if not (settings.tau > 0 and math.isfinite(settings.tau)):
        raise FederationError(f"strategy.tau={settings.tau} must be greater than 0")


OF_THE_MEAN = ("fedavg", "fedavgm", "fedadam")
"""Strategies that need nothing of a round's replies but their weighted mean."""


def build_inner(settings: StrategySettings) -> Strategy:
    """Flower's own strategy, behind ``MeanStrategy`` where the mean is all that it needs."""
    strategy = build_flower(settings)
    return MeanStrategy(strategy) if settings.name in OF_THE_MEAN else strategy


def build_flower(settings: StrategySettings) -> Strategy:
    """Flower's own strategy. It takes every node that it is shown; which ones is ``SeededStrategy``'s business."""
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
