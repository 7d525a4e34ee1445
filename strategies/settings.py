"""The settings of the server's strategy, and their checks. Loads neither torch nor Flower."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from gradcodec.plugins import Plugins
from strategies.errors import FederationError

STRATEGIES = ("fedavg", "fedavgm", "fedadam", "fedmedian", "fedtrimmedavg")
OF_THE_MEAN = ("fedavg", "fedavgm", "fedadam")
"""Strategies that need nothing of a round's replies but their weighted mean."""
PLUGINS = Plugins("cg_fedllm.strategies", own=lambda: STRATEGIES)
"""What other distributions bring: functions as ``strategies.build.Builder``, by the strategy's name."""


@dataclass
class StrategySettings:
    """How the server turns the clients' updates into the next adapter."""

    name: str = "fedavg"  # fedavg | fedavgm | fedadam | fedmedian | fedtrimmedavg | a plug-in's, on the server's host
    lr: float = 1.0  # of the server: fedavg, fedavgm, fedadam
    momentum: float = 0.9  # fedavgm; beta_1 of fedadam
    beta_2: float = 0.99  # fedadam
    tau: float = 1e-4  # fedadam: added to the root of the second moment
    clip_norm_ratio: float | None = 3.0  # an update longer than so many usual ones is scaled down; null: never
    max_norm_ratio: float | None = 10.0  # a longer one is refused; null: never
    options: dict[str, Any] = field(default_factory=dict)  # a plug-in's own settings


def check_strategy(settings: StrategySettings) -> None:
    """Raises ValueError naming the first key that cannot be served."""
    if refusal := PLUGINS.refusal(settings.name, settings.options, "strategy", "strategies"):
        raise FederationError(refusal)
    if not (settings.lr > 0 and math.isfinite(settings.lr)):
        raise FederationError(f"strategy.lr={settings.lr} must be greater than 0")
    for key in ("momentum", "beta_2"):
        if not 0 <= getattr(settings, key) < 1:
            raise FederationError(f"strategy.{key}={getattr(settings, key)} must be at least 0 and less than 1")
    if not (settings.tau > 0 and math.isfinite(settings.tau)):
        raise FederationError(f"strategy.tau={settings.tau} must be greater than 0")
    for key in ("clip_norm_ratio", "max_norm_ratio"):
        ratio = getattr(settings, key)
        if ratio is not None and not (ratio >= 1 and math.isfinite(ratio)):
            raise FederationError(f"strategy.{key}={ratio} must be at least 1, or null")
