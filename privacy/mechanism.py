"""The Gaussian mechanism on a client's whole update (McMahan et al. 2018, "Learning Differentially Private Recurrent
Language Models"; Dwork and Roth 2014, appendix A): clipped, then noised, before anything else is done with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from privacy.errors import PrivacyError

Normals = Callable[[torch.Size], Tensor]
"""A shape -> standard normals of that shape, float32, from randomness that nobody else knows."""


def norm_of(update: Mapping[str, Tensor]) -> float:
    """L2 norm over all tensors, summed in float64."""
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in update.values()))


def clipped(update: Mapping[str, Tensor], clip: float) -> dict[str, Tensor]:
    """The update, scaled down where its L2 norm over all tensors is more than ``clip``. Raises PrivacyError: it is not
    finite, so that nothing bounds it."""
    norm = norm_of(update)
    if not math.isfinite(norm):
        raise PrivacyError("the update holds NaN or infinity: nothing of it is released (lower train.lr)")
    scale = min(1.0, clip / norm) if norm > 0 else 1.0
    return {name: tensor * scale for name, tensor in update.items()}


def noised(update: Mapping[str, Tensor], deviation: float, normals: Normals) -> dict[str, Tensor]:
    """The update and independent Gaussian noise of this standard deviation in every value."""
    return {
        name: tensor + deviation * normals(tensor.shape).to(tensor.device, tensor.dtype)
        for name, tensor in update.items()
    }
