"""One client's answer to one round. No torch here: see ``link.py``."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Arrays = dict[str, NDArray[np.float32]]
Overrides = tuple[tuple[str, str], ...]
"""A node's own paths by key of its node config: ``model-path``, ``task-path``, ``codec-artifact``."""


@dataclass(frozen=True)
class Trained:
    """The dense adapter or the payload, whichever the arm sends."""

    adapter: Arrays | None
    payload: bytes | None
    num_examples: int
    train_loss: float
    seconds_train: float
    seconds_encode: float
