"""How near a reconstruction is to what was meant."""

from __future__ import annotations

import math
from collections.abc import Callable
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
    """Of two tensors of one shape, in float64."""
    return _sum_over_pieces(one, other, lambda a, b: a.double() @ b.double())


def squared_distance(one: Tensor, other: Tensor, gain: float = 1.0) -> float:
    """``|one - gain * other|^2`` of two tensors of one shape, in float64."""

    def of_piece(a: Tensor, b: Tensor) -> Tensor:
        rest = (a - b * gain).double()
        return rest @ rest

    return _sum_over_pieces(one, other, of_piece)


def _sum_over_pieces(one: Tensor, other: Tensor, of_piece: Callable[[Tensor, Tensor], Tensor]) -> float:
    """A whole copy in float64 would be too large. The sum is asked for once: a device is not waited for before."""
    total = one.new_zeros((), dtype=torch.float64)
    for piece, other_piece in zip(one.flatten().split(_PIECE), other.flatten().split(_PIECE), strict=True):
        total += of_piece(piece, other_piece)
    return float(total)


def fidelity(target: Tensor, decoded: Tensor) -> Fidelity:
    """Compares two tensors of one shape."""
    energy, error = inner_product(target, target), squared_distance(target, decoded)
    norms = math.sqrt(energy * inner_product(decoded, decoded))
    cosine = inner_product(target, decoded) / norms if norms > 0 else 0.0
    snr_db = 10 * math.log10(energy / error) if energy > 0 and error > 0 else (math.inf if error == 0 else -math.inf)
    return Fidelity(cosine, snr_db)


def gaussian_bound_cosine(bits_per_parameter: float) -> float:
    """The highest cosine that any code of this rate reaches on an i.i.d. Gaussian (Shannon): sqrt(1 - 2^-2R)."""
    return math.sqrt(1 - 2.0 ** (-2 * bits_per_parameter))
