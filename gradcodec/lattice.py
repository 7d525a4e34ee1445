"""Lattice: real numbers <-> integers whose sum over clients decodes to the sum of the numbers.

Uniform rounding with a *dither*, uniform noise from a seed that both ends have: it is added before rounding and taken
away after the sum. Within the range the error is then uniform over a step and independent of the value and of the
other clients' errors, so that errors of n clients add up to n, and not n squared, twelfths of a squared step (Schuchman
1964, "Dither signals and their effect on quantization noise"; Ziv 1985 and Zamir and Feder 1992, "On universal
quantization by randomized uniform/lattice quantizers"). Beyond the range a value saturates.

An integer of a wide range is sent as several *digits* in base ``levels``: all that travels has the same few levels.

Shape suffixes: K coordinates, S integers sent.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

from gradcodec.errors import CodecError, DivergedError
from gradcodec.residues import Integers

Doubles = NDArray[np.float64]

_SHRINK = 1 - 2.0**-10
"""At least so much is taken away where rounding added to the norm."""


def dither_of(count: int, seed: bytes) -> Doubles:
    """Uniform in [-1/2, 1/2), ``[count]``, the same on every machine: 32 bits a value from PCG64."""
    entropy = int.from_bytes(hashlib.sha256(b"dither/" + seed).digest()[:16], "little")
    raw = np.random.PCG64(entropy).random_raw(-(-count // 2)).astype("<u8").view("<u4")[:count]
    return raw / 2.0**32 - 0.5


def quantize(scaled_K: Doubles, half_K: Integers, dither_K: Doubles) -> Integers:
    """Values in steps -> integers ``[K]`` in -half..half; beyond that they saturate.

    Raises:
        CodecError: NaN or infinity.
    """
    if not np.isfinite(scaled_K).all():
        raise DivergedError("the update holds NaN or infinity: training diverged")
    return np.clip(np.rint(scaled_K + dither_K), -half_K, half_K).astype(np.int64)


def restore(integers_K: Integers, dither_K: Doubles) -> Doubles:
    """Inverse of ``quantize``, in steps; of a sum of integers with the sum of their dithers."""
    restored: Doubles = integers_K - dither_K
    return restored


def bounded(scaled_K: Doubles, half_K: Integers, dither_K: Doubles, radius: float) -> Integers:
    """As ``quantize``, and the integers' L2 norm is at most ``radius``, exactly: their squares are summed as integers.

    The values are scaled down and rounded again until it holds, so what the bound costs is length, not direction. It
    comes to an end: what is scaled to nothing rounds to zero, whatever the dither.

    Args:
        radius: at least 0, in integers. It is what a client adds at most to the sum, so the sensitivity of a mechanism
            that noises the sum.

    Raises:
        CodecError: ``radius`` is negative or not finite.
        CodecError: NaN or infinity among the values.
    """
    if not 0 <= radius < math.inf:
        raise CodecError(f"a radius of {radius}: a finite number of at least 0 is expected")
    most = math.floor(radius * radius)
    norm = float(np.linalg.norm(scaled_K))
    scale = min(1.0, radius / norm) if norm > 0 else 1.0
    integers_K = quantize(scaled_K * scale, half_K, dither_K)
    while (energy := _energy(integers_K)) > most:
        scale *= min(_SHRINK, math.sqrt(most / energy))
        integers_K = quantize(scaled_K * scale, half_K, dither_K)
    return integers_K


def _energy(integers_K: Integers) -> int:
    return int(integers_K @ integers_K)


def to_digits(integers_K: Integers, num_digits_K: Integers, levels: int) -> Integers:
    """Integers in -half..half with ``half = (levels ** num_digits - 1) / 2`` -> digits ``[S]`` in 0..levels-1: the
    lowest digit of every integer, then the second of those that have one, and so on."""
    rest_K = integers_K + half_of(num_digits_K, levels)
    parts = []
    for place in range(int(num_digits_K.max(initial=0))):
        parts.append(rest_K[num_digits_K > place] % levels)
        rest_K = rest_K // levels
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def of_digits(digits_S: Integers, num_digits_K: Integers, levels: int) -> Integers:
    """Inverse of ``to_digits`` for digits that are centred, in -(levels-1)/2..(levels-1)/2, and for sums of them."""
    integers_K, stop = np.zeros(len(num_digits_K), np.int64), 0
    for place in range(int(num_digits_K.max(initial=0))):
        there_K = num_digits_K > place
        start, stop = stop, stop + int(there_K.sum())
        integers_K[there_K] += digits_S[start:stop] * levels**place
    return integers_K


def half_of(num_digits_K: Integers, levels: int) -> Integers:
    """The largest integer that so many digits hold."""
    return (levels**num_digits_K - 1) // 2


def centred(residues_S: Integers, modulus: int, offset: int) -> Integers:
    """Residues of sums that have ``offset`` in them -> the sums less it, nearest to zero modulo ``modulus``."""
    half = (modulus - 1) // 2
    return (residues_S - offset + half) % modulus - half


@cache
def step_of(span: int) -> tuple[float, float]:
    """The step of least squared error for a standard normal value and ``span`` levels, dithered, and that error.

    Sought numerically: a coarser step rounds more, a finer one saturates more.
    """
    steps = [12 / span * i / 60 for i in range(6, 61)]
    errors = {step: _moments(span, step)[0] for step in steps}
    best = min(errors, key=lambda step: errors[step])
    return best, errors[best]


def unsaturated(seen: float, span: int) -> float:
    """The energy of normal values over what was expected, from that of what was decoded: saturation hides a part.

    Args:
        seen: energy of decoded values, less that of rounding, over the energy that the step was made for.
        span: levels of the values.

    Returns:
        At most 64: where nearly all saturate, more cannot be told.
    """
    energies, hidden = _saturation(span)
    return float(np.interp(seen, hidden, energies)) if seen > hidden[0] else max(seen, 0.0)


@cache
def _saturation(span: int) -> tuple[Doubles, Doubles]:
    """Energies of values, and those that are seen of them, both ascending."""
    step = step_of(span)[0]
    energies = np.exp2(np.arange(-6, 6.5, 0.5))
    seen = [_moments(span, step / math.sqrt(energy))[1] * energy for energy in energies]
    return energies, np.maximum.accumulate(np.array(seen) - step * step / 12)


def _moments(span: int, step: float) -> tuple[float, float]:
    """Of a standard normal value and what it decodes to: the mean squared error, and the mean square of the latter."""
    values = np.linspace(-6, 6, 1201)
    weights = np.exp(-values * values / 2)
    weights /= weights.sum()
    dithers = (np.arange(16) + 0.5) / 16 - 0.5
    half = (span - 1) // 2
    decoded = (np.clip(np.rint(values[:, None] / step + dithers), -half, half) - dithers) * step
    return float(weights @ np.square(decoded - values[:, None]).mean(1)), float(weights @ np.square(decoded).mean(1))


def total_dither(count: int, seed: bytes, clients: Sequence[int]) -> Doubles:
    """The sum of the dithers of these clients, ``[count]``."""
    total = np.zeros(count)
    for client in clients:
        total += dither_of(count, client_seed(seed, client))
    return total


def client_seed(seed: bytes, client: int) -> bytes:
    """What a client's dither comes from. Two clients, or two rounds, never share one."""
    return seed + b"/client/" + str(client).encode()
