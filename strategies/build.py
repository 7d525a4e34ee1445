"""Settings -> strategy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flwr.serverapp.strategy import FedAdam, FedAvg, FedAvgM, Strategy

from strategies.errors import FederationError
from strategies.mean import MeanStrategy
from strategies.robust import RobustStrategy, RootUpdate
from strategies.settings import OF_THE_MEAN, PLUGINS, ROBUST, STRATEGIES, StrategySettings, check_strategy
from strategies.wire import ARRAYS, CONFIG, NUM_EXAMPLES

Builder = Callable[..., Strategy]
"""Settings, the arguments that every strategy of Flower's takes here, and by name the options that it knows -> the
strategy; a ValueError refuses them.

A strategy whose attribute ``of_the_mean`` is true is shown one reply a round, the weighted mean of all. What one must
remember from round to round goes into checkpoints if it follows ``strategies.optimizer.Remembers``, as Flower's own
optimizers do without.
"""


def build_inner(settings: StrategySettings, root: RootUpdate | None = None) -> Strategy:
    """Flower's own strategy, a robust one or a plug-in's, behind ``MeanStrategy`` where the mean is all that it needs.
    ``root`` is the server's own update, for FLTrust."""
    strategy = build_flower(settings, root)
    of_the_mean = settings.name in OF_THE_MEAN or getattr(strategy, "of_the_mean", False)
    return MeanStrategy(strategy) if of_the_mean else strategy


def build_flower(settings: StrategySettings, root: RootUpdate | None = None) -> Strategy:
    """The strategy by itself. It takes every node that it is shown; which ones is ``FederatedStrategy``'s business."""
    check_strategy(settings)
    common: dict[str, Any] = {
        "fraction_train": 1.0,
        "fraction_evaluate": 0.0,
        "min_train_nodes": 1,
        "min_available_nodes": 1,
        "weighted_by_key": NUM_EXAMPLES,
        "arrayrecord_key": ARRAYS,
        "configrecord_key": CONFIG,
    }
    if settings.name not in STRATEGIES:
        return _brought(settings, common)
    if settings.name in ROBUST:
        if settings.name == "fltrust" and root is None:
            raise FederationError(
                "strategy.name=fltrust needs the server's own update on data that it trusts, and this program has none"
            )
        return RobustStrategy(settings, root, **common)
    if settings.name == "fedadam":
        moments: dict[str, Any] = {"beta_1": settings.momentum, "beta_2": settings.beta_2, "tau": settings.tau}
        return FedAdam(eta=settings.lr, **moments, **common)
    if settings.name == "fedavgm" or (settings.name == "fedavg" and settings.lr != 1.0):
        momentum = settings.momentum if settings.name == "fedavgm" else 0.0
        return FedAvgM(server_learning_rate=settings.lr, server_momentum=momentum, **common)
    return FedAvg(**common)


def proximal_mu_of(strategy: Strategy) -> float:
    """What a FedProx of Flower's, or one like it, puts into its messages for the clients; 0.0: it is none."""
    while (inner := getattr(strategy, "inner", None)) is not None:
        strategy = inner
    return float(getattr(strategy, "proximal_mu", 0.0))


def _brought(settings: StrategySettings, common: dict[str, Any]) -> Strategy:
    try:
        strategy = PLUGINS.load(settings.name)(settings, common, **settings.options)
    except ValueError as error:
        raise FederationError(f"strategy.name={settings.name}: {error}") from None
    except Exception as error:  # it is another's code, which may raise anything
        raise FederationError(f"strategy.name={settings.name}: {PLUGINS.origin(settings.name)}: {error!r}") from error
    if not isinstance(strategy, Strategy):
        raise FederationError(
            f"strategy.name={settings.name}: {PLUGINS.origin(settings.name)} gives no strategy of Flower's"
        )
    return strategy
