"""How near a reconstruction is to what was meant."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Fidelity:
    """Cosine in [-1, 1] (0 for a zero vector), and signal-to-noise ratio in dB (energy over error energy)."""

    cosine: float
    snr_db: float


def fidelity(target: Tensor, decoded: Tensor) -> Fidelity:
    """Compares two tensors of one shape."""
    t, d = target.flatten().double(), decoded.flatten().double()
    energy, error = float(t @ t), float((t - d) @ (t - d))
    norms = math.sqrt(energy * float(d @ d))
    cosine = float(t @ d) / norms if norms > 0 else 0.0
    snr_db = 10 * math.log10(energy / error) if energy > 0 and error > 0 else (math.inf if error == 0 else -math.inf)
    return Fidelity(cosine, snr_db)


def gaussian_bound_cosine(bits_per_parameter: float) -> float:
    """The highest cosine that any code of this rate reaches on an i.i.d. Gaussian (Shannon): sqrt(1 - 2^-2R)."""
    return math.sqrt(1 - 2.0 ** (-2 * bits_per_parameter))
