"""The memory of Flower's server optimizers, out and in again: what a checkpoint needs beside the adapter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from flwr.serverapp.strategy import FedAvgM, Strategy
from flwr.serverapp.strategy.fedopt import FedOpt
from numpy.typing import NDArray
from torch import Tensor

from gradcodec.flower.wrapping import WrappingStrategy

_MOMENTS = ("m_t", "v_t")


@runtime_checkable
class Remembers(Protocol):
    """A strategy with a memory of its own, which a resumed run goes on with."""

    def state_arrays(self) -> Mapping[str, NDArray[Any]]:
        """What it remembers, as float32 arrays of any names; empty before the first round."""
        ...

    def load_state_arrays(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Inverse of ``state_arrays``. Raises ValueError or KeyError: they are none of its own."""
        ...


def optimizer_state(strategy: Strategy) -> dict[str, Tensor]:
    """Moments of FedAdam and its relatives (``m_t/<tensor>``, ``v_t/<tensor>``), the momentum of FedAvgM
    (``momentum/<place>``), and what a strategy says of itself (``Remembers``); nothing for strategies without memory,
    and before the first round."""
    flower = _innermost(strategy)
    found: Mapping[str, NDArray[Any]]
    if isinstance(flower, Remembers):
        found = flower.state_arrays()
    elif isinstance(flower, FedOpt):
        found = {f"{m}/{name}": array for m in _MOMENTS for name, array in (getattr(flower, m) or {}).items()}
    elif isinstance(flower, FedAvgM):
        found = {f"momentum/{place:06d}": array for place, array in enumerate(flower.momentum_vector or [])}
    else:
        found = {}
    return {key: torch.from_numpy(np.array(array, np.float32)) for key, array in found.items()}


def restore_optimizer(strategy: Strategy, state: Mapping[str, Tensor]) -> None:
    """Inverse of ``optimizer_state``."""
    flower = _innermost(strategy)
    if isinstance(flower, Remembers):
        flower.load_state_arrays({key: tensor.numpy().copy() for key, tensor in state.items()})
    elif isinstance(flower, FedOpt) and state:
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
