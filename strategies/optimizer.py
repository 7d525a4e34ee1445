"""The memory of Flower's server optimizers, out and in again: what a checkpoint needs beside the adapter."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from flwr.serverapp.strategy import FedAvgM, Strategy
from flwr.serverapp.strategy.fedopt import FedOpt
from torch import Tensor

from strategies.wrapping import WrappingStrategy

_MOMENTS = ("m_t", "v_t")


def optimizer_state(strategy: Strategy) -> dict[str, Tensor]:
    """Moments of FedAdam (``m_t/<tensor>``, ``v_t/<tensor>``) and the momentum of FedAvgM (``momentum/<place>``);
    nothing for strategies without memory, and before the first round."""
    flower = _innermost(strategy)
    if isinstance(flower, FedOpt):
        found = {f"{m}/{name}": array for m in _MOMENTS for name, array in (getattr(flower, m) or {}).items()}
    elif isinstance(flower, FedAvgM):
        found = {f"momentum/{place:06d}": array for place, array in enumerate(flower.momentum_vector or [])}
    else:
        found = {}
    return {key: torch.from_numpy(array.copy()) for key, array in found.items()}


def restore_optimizer(strategy: Strategy, state: Mapping[str, Tensor]) -> None:
    """Inverse of ``optimizer_state``."""
    flower = _innermost(strategy)
    if isinstance(flower, FedOpt) and state:
        for moment in _MOMENTS:
            head = f"{moment}/"
            arrays = {key.removeprefix(head): t.numpy().copy() for key, t in state.items() if key.startswith(head)}
            setattr(flower, moment, arrays)
    elif isinstance(flower, FedAvgM) and state:
        flower.momentum_vector = [state[key].numpy().copy() for key in sorted(state)]


def begin_round(strategy: Strategy) -> None:
    """The round's own adapter counts: FedAvgM goes on from what it gave last, and what all hold may be another one, as
    where a broadcast is coded."""
    flower = _innermost(strategy)
    if isinstance(flower, FedAvgM):
        flower.current_arrays = None  # it takes the next one that it is shown


def _innermost(strategy: Strategy) -> Strategy:
    while isinstance(strategy, WrappingStrategy):
        strategy = strategy.inner
    return strategy
