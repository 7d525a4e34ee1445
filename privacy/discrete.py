"""Gaussian noise over the integers, for sums modulo a number, and how far a sum of such noises is from one of them.
Knows streams and arrays; no mask, budget or tensor.

The discrete Gaussian N_Z(0, sigma^2) has P(x) proportional to exp(-x^2 / (2 sigma^2)) at every integer x (Canonne,
Kamath and Steinke, "The Discrete Gaussian for Differential Privacy", NeurIPS 2020). Added to an integer it protects it
as the continuous one does, and has no floating point that could undo it.

In a masked sum every client adds a share of the noise, N_Z(0, sigma^2 / n). The sum of n shares is not quite
N_Z(0, sigma^2); ``sum_divergence`` and ``sum_tau`` bound the difference (Kairouz, Liu and Steinke, "The Distributed
Discrete Gaussian Mechanism for Federated Learning with Secure Aggregation", ICML 2021).

Sampling inverts the distribution function, tabulated in 128-bit integers. A 64-bit word decides nearly always; where an
entry of the table begins with the same 64 bits, 64 more are drawn. So the total variation distance from the exact
distribution is below (number of entries) * 2^-127 + P(|x| > 12 sigma + 2), less than 2^-100 altogether. The time that a
draw takes depends on its value, by cache misses: who measures that on the client's own machine is out of scope.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from decimal import Decimal, localcontext
from fractions import Fraction
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from privacy.errors import PrivacyError
from privacy.stream import Stream

MAX_SIGMA = float(1 << 15)
MIN_SIGMA_OF_SUM = 0.5  # what the bounds of Kairouz, Liu and Steinke ask of a share
_TAIL = 12  # standard deviations that the table reaches: beyond it lies less than 2^-103
_BITS, _WORD_BITS = 128, 64
_FIXED_BITS = 320  # of the arithmetic that makes a table: rounding adds up to (entries)^2 units of the last of them


def discrete_gaussians(shape: int | tuple[int, ...], sigma: float, stream: Stream) -> NDArray[np.int64]:
    """Independent samples of N_Z(0, sigma^2), int64, of the given shape.

    Args:
        shape: of the result.
        sigma: the parameter, 0 (no noise) to 32768, in units of the integers. From 1 on it is the standard deviation
            to within 1e-6; below, the standard deviation is smaller.
        stream: where the bits come from.

    Raises:
        PrivacyError: a sigma out of this range.
    """
    if not 0 <= sigma <= MAX_SIGMA:
        raise PrivacyError(f"discrete noise of sigma {sigma}: it must lie between 0 and {MAX_SIGMA:.0f}")
    count = math.prod((shape,) if isinstance(shape, int) else shape)
    if sigma == 0:
        return np.zeros(shape, dtype=np.int64)
    table = _table(sigma)
    words = stream.words(count)
    index = np.searchsorted(table.high, words, side="right")
    for place in np.flatnonzero((index > 0) & (table.high[index - 1] == words)):
        low = int(stream.words(1)[0])
        index[place] = bisect_right(table.exact, int(words[place]) << _WORD_BITS | low)
    return (index.astype(np.int64) - table.reach).reshape(shape)


def sum_divergence(sigma: float, count: int) -> float:
    """How far the sum of ``count`` samples of N_Z(0, sigma^2) is at most from N_Z(0, count * sigma^2): the largest
    |log(P(x) / Q(x))| of any integer x, in nats. For a sigma of 0.5 or more; it vanishes quickly beyond 1.

    The bound is 5 * sum over k from 1 to count - 1 of exp(-2 pi^2 sigma^2 k / (k + 1)): theorem 11 of Kairouz, Liu and
    Steinke, one share added to the sum of k.

    Raises:
        PrivacyError: a sigma under 0.5, for which nothing is proven.
    """
    if not sigma >= MIN_SIGMA_OF_SUM:
        raise PrivacyError(
            f"a share of noise of sigma {sigma} is under {MIN_SIGMA_OF_SUM}: too coarse for sums of shares to be "
            "bounded; scale the integers or the noise up"
        )
    return 5 * math.fsum(math.exp(-2 * (math.pi * sigma) ** 2 * k / (k + 1)) for k in range(1, count))


def sum_tau(sigma: float, count: int) -> float:
    """Tau of proposition 14 of Kairouz, Liu and Steinke, twice ``sum_divergence``: adding the sum of ``count`` shares
    of N_Z(0, sigma^2) in each of d coordinates to integers whose L2 sensitivity is Delta gives eps^2/2-concentrated
    differential privacy with eps = min(sqrt(Delta^2 / (count sigma^2) + tau d / 2),
    Delta / (sqrt(count) sigma) + tau sqrt(d)).

    Raises:
        PrivacyError: a sigma under 0.5.
    """
    return 2 * sum_divergence(sigma, count)


@dataclass(frozen=True)
class _Table:
    """The distribution function of x from -reach to reach - 1, in units of 2^-128; at reach it is 1."""

    reach: int
    exact: list[int]
    high: NDArray[np.uint64]  # the upper 64 bits of each


@lru_cache(maxsize=4)
def _table(sigma: float) -> _Table:
    reach = math.ceil(_TAIL * sigma) + 2
    weights = _weights(Fraction(sigma) ** 2, reach)
    weights = weights[:0:-1] + weights
    total = sum(weights)
    exact, below = [], 0
    for weight in weights[:-1]:
        below += weight
        exact.append(min((below << _BITS) // total, (1 << _BITS) - 1))
    return _Table(reach, exact, np.array([entry >> _WORD_BITS for entry in exact], dtype=np.uint64))


def _weights(variance: Fraction, reach: int) -> list[int]:
    """exp(-x^2 / (2 variance)) for x from 0 to reach, in units of 2^-320. Each is the one before times a ratio, and
    each ratio the one before times exp(-1 / variance)."""
    ratio, step = _exponential(1 / (2 * variance)), _exponential(1 / variance)
    weights = [1 << _FIXED_BITS]
    for _ in range(reach):
        weights.append(weights[-1] * ratio >> _FIXED_BITS)
        ratio = ratio * step >> _FIXED_BITS
    return weights


def _exponential(exponent: Fraction) -> int:
    """exp(-exponent) in units of 2^-320."""
    with localcontext() as context:
        context.prec = 120
        value = (-Decimal(exponent.numerator) / Decimal(exponent.denominator)).exp()
        return int(value * (1 << _FIXED_BITS))
