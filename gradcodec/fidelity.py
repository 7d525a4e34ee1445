"""How near a reconstruction is to what was meant."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_PIECE = 1 << 18


@dataclass(frozen=True)
class Fidelity:
    """Cosine in [-1, 1] (0 for a zero vector), and signal-to-noise ratio in dB (energy over error energy)."""

    cosine: float
    snr_db: float


def inner_product(one: Tensor, other: Tensor) -> float:
    """Of two tensors of one shape, in float64, a piece at a time: a whole copy in float64 would be too large."""
    total = one.new_zeros((), dtype=torch.float64)  # asked for once: a device works on while the host goes ahead
    for piece, other_piece in zip(one.flatten().split(_PIECE), other.flatten().split(_PIECE), strict=True):
        total += piece.double() @ other_piece.double()
    return float(total)


def fidelity(target: Tensor, decoded: Tensor) -> Fidelity:
    """Compares two tensors of one shape."""
    rest = target - decoded
    energy, error = inner_product(target, target), inner_product(rest, rest)
    norms = math.sqrt(energy * inner_product(decoded, decoded))
    cosine = inner_product(target, decoded) / norms if norms > 0 else 0.0
    snr_db = 10 * math.log10(energy / error) if energy > 0 and error > 0 else (math.inf if error == 0 else -math.inf)
    return Fidelity(cosine, snr_db)


def gaussian_bound_cosine(bits_per_parameter: float) -> float:
    """The highest cosine that any code of this rate reaches on an i.i.d. Gaussian (Shannon): sqrt(1 - 2^-2R)."""
    return math.sqrt(1 - 2.0 ** (-2 * bits_per_parameter))
