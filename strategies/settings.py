"""The settings of the server's strategy, and their checks. Loads neither torch nor Flower."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from gradcodec.plugins import Plugins
from strategies.errors import FederationError

ROBUST = {
    "krum": (2, 3),
    "multikrum": (2, 3),
    "bulyan": (4, 3),
    "fedmedian": (2, 1),
    "fedtrimmedavg": (2, 1),
    "centredclip": (2, 1),
    "rfa": (2, 1),
    "fltrust": (0, 1),
}
"""Strategies that bear malicious clients, and ``(a, b)``: with f of them a round needs ``a * f + b`` replies."""
STRATEGIES = ("fedavg", "fedavgm", "fedadam", *ROBUST)
OF_THE_MEAN = ("fedavg", "fedavgm", "fedadam")
"""Strategies that need nothing of a round's replies but their weighted mean."""
PLUGINS = Plugins("cg_fedllm.strategies", own=lambda: STRATEGIES)
"""What other distributions bring: functions as ``strategies.build.Builder``, by the strategy's name."""


@dataclass
class StrategySettings:
    """How the server turns the clients' updates into the next adapter."""

    # fedavg | fedavgm | fedadam, or against malicious clients krum | multikrum | bulyan | fedmedian | fedtrimmedavg |
    # centredclip | rfa | fltrust; or a plug-in's, on the server's host
    name: str = "fedavg"
    lr: float = 1.0  # of the server: how far the aggregate is followed
    momentum: float = 0.9  # fedavgm; beta_1 of fedadam
    beta_2: float = 0.99  # fedadam
    tau: float = 1e-4  # fedadam: added to the root of the second moment
    clip_norm_ratio: float | None = 3.0  # an update longer than so many usual ones is scaled down; null: never
    max_norm_ratio: float | None = 10.0  # a longer one is refused; null: never
    max_norm: float | None = None  # an update of a larger L2 norm is scaled down to it; null: none is
    malicious: float = 0.2  # assumed of a round, against which the robust ones hold: a share below 1/2, or a number
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
    if settings.max_norm is not None and not (settings.max_norm > 0 and math.isfinite(settings.max_norm)):
        raise FederationError(f"strategy.max_norm={settings.max_norm} must be greater than 0, or null")
    malicious = settings.malicious
    if not (0 <= malicious < 0.5 or (math.isfinite(malicious) and malicious >= 1 and malicious == int(malicious))):
        raise FederationError(
            f"strategy.malicious={malicious} must be a share of a round's clients, at least 0 and less than 0.5, or a "
            "whole number of them"
        )


def num_malicious(settings: StrategySettings, num_replies: int) -> int:
    """How many of so many replies are taken to be an attacker's: of a share the next whole number above."""
    malicious = settings.malicious
    return int(malicious) if malicious >= 1 else math.ceil(malicious * num_replies - 1e-9)


def too_few(settings: StrategySettings, num_replies: int) -> str:
    """Why a robust strategy makes nothing of so many replies, and what to do; empty: it can, or is not a robust one."""
    if settings.name not in ROBUST:
        return ""
    factor, more = ROBUST[settings.name]
    least = factor * (assumed := num_malicious(settings, num_replies)) + more
    if num_replies >= least:
        return ""
    needs = f"{factor}f + {more} = {least}" if factor else f"{least}"
    return (
        f"strategy.name={settings.name} needs {needs} clients in a round with f = {assumed} malicious ones "
        f"(strategy.malicious={settings.malicious:g}), and there are {num_replies}"
    )


def check_attackers(settings: StrategySettings, clients_per_round: int) -> None:
    """Raises ValueError: a round of so many clients is too small for the strategy even if all of them answer."""
    if reason := too_few(settings, clients_per_round):
        raise FederationError(
            f"{reason}: give a larger federation.clients_per_round, a smaller strategy.malicious or another strategy"
        )
