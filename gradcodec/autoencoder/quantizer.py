"""Quantizer: coefficients <-> symbols, one uniform step for all of them, and for every class of coefficients an entropy
model, decision thresholds and centroids that TGAP learned.

A coefficient's *class* is the energy that is expected of it over the squared step, in levels of 1.5 dB. One step for
all is reverse water-filling: what is expected to lie below it falls to zero by itself. The thresholds are the search:
for a scalar, the codeword of least squared error plus ``PRICE_OF_A_BIT`` times bits changes at one point between two
neighbours (entropy-constrained quantisation: Chou, Lookabaugh, Gray 1989).

Shape suffixes: M magnitudes, N coefficients of one class.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradcodec.entropy import TOTAL, Symbols, Table, bits_of, integer_table

MIN_CLASS, MAX_TABLED, MAX_CLASS = -8, 13, 40
"""Below the first, coefficients are silent; above the second, their lowest bits are sent as they are."""
CLASSES = range(MIN_CLASS, MAX_TABLED + 1)
PRICE_OF_A_BIT = 0.14
"""Lambda, in squared steps. ln(2) / 6 = 0.116 is what uniform steps trade at at a high rate."""
_MAX_MAGNITUDE = 40

Integers = NDArray[np.int64]


def deviation(symbol_class: int) -> float:
    """Root of the energy that is expected of a class, in steps."""
    return float(2.0 ** (symbol_class / 4))


def largest_magnitude(symbol_class: int) -> int:
    """Magnitudes above are clipped; what is cut off stays in the residual."""
    return min(_MAX_MAGNITUDE, 3 + math.ceil(8 * deviation(symbol_class)))


@dataclass(frozen=True)
class ClassCoder:
    """One class: frequencies of its symbols -M..M, and the centroids of their magnitudes in steps, ``[M + 1]``."""

    table: Table
    centroids_M: Tensor

    @property
    def largest(self) -> int:
        return len(self.centroids_M) - 1

    def thresholds(self, price: float = PRICE_OF_A_BIT) -> Tensor:
        """Where magnitude m turns into m + 1, in steps, ``[M]``; never falling."""
        bits_M = torch.from_numpy(bits_of(self.table)[self.largest :]).float()
        between_M = (self.centroids_M[1:] + self.centroids_M[:-1]) / 2
        gap_M = (self.centroids_M[1:] - self.centroids_M[:-1]).clamp_min(1e-3)
        return torch.cummax(between_M + price * (bits_M[1:] - bits_M[:-1]) / (2 * gap_M), dim=0).values


class Quantizer:
    """All classes. ``quantize`` and ``restore`` are inverse up to the step."""

    def __init__(self, coders: dict[int, ClassCoder]) -> None:
        assert coders.keys() == set(CLASSES)
        self.coders = coders
        self._thresholds = {c: coder.thresholds() for c, coder in coders.items()}
        self._bits = {c: torch.from_numpy(bits_of(coder.table)).float() for c, coder in coders.items()}

    def quantize(self, values_N: Tensor, symbol_class: int) -> tuple[Tensor, Tensor | None]:
        """Values in steps -> symbols -M..M, and the low bits of the highest classes, both ``[N]`` integers."""
        coder, low_bits = self.coders[_tabled(symbol_class)], num_low_bits(symbol_class)
        if low_bits:
            largest = (coder.largest + 1 << low_bits) - 1
            whole_N = values_N.round().clamp(-largest, largest).int() + (1 << low_bits - 1)
            symbols_N = (whole_N >> low_bits).clamp(-coder.largest, coder.largest)
            return symbols_N, whole_N - (symbols_N << low_bits) & (1 << low_bits) - 1
        magnitudes_N = torch.bucketize(values_N.abs(), self._thresholds[symbol_class], out_int32=True)
        return torch.where(values_N < 0, -magnitudes_N, magnitudes_N), None

    def restore(self, symbols_N: Tensor, low_N: Tensor | None, symbol_class: int) -> Tensor:
        """Inverse of ``quantize``, ``[N]`` float32 in steps."""
        if low_N is not None:
            low_bits = num_low_bits(symbol_class)
            return ((symbols_N << low_bits) + low_N - (1 << low_bits - 1)).float()
        return self.coders[symbol_class].centroids_M[symbols_N.abs()] * symbols_N.sign()

    def num_bits(self, symbols_N: Tensor, symbol_class: int) -> float:
        """What symbols and low bits take."""
        bits_M = self._bits[_tabled(symbol_class)]
        counts_M = torch.bincount(symbols_N + self.coders[_tabled(symbol_class)].largest, minlength=len(bits_M))
        return float(counts_M.float() @ bits_M) + num_low_bits(symbol_class) * len(symbols_N)

    def table(self, symbol_class: int) -> Table:
        return self.coders[_tabled(symbol_class)].table


def num_low_bits(symbol_class: int) -> int:
    """How many of a magnitude's lowest bits a class sends as they are: at such rates they are uniform."""
    return max(0, math.ceil((symbol_class - MAX_TABLED) / 4))


@lru_cache(maxsize=16)
def low_bits_table(low_bits: int) -> Table:
    return integer_table(np.ones(1 << low_bits))


def to_symbols(symbols_N: Tensor, largest: int) -> Symbols:
    """Signed -> 0..2M, as the entropy coder has them."""
    return (symbols_N + largest).cpu().numpy().astype(np.int32)


def _tabled(symbol_class: int) -> int:
    return symbol_class - 4 * num_low_bits(symbol_class)


def frozen_coder(counts_M: NDArray[np.float64], centroids_M: Tensor) -> ClassCoder:
    """Counts of magnitudes -> integer frequencies of symbols, the same for both signs."""
    shares = counts_M / counts_M.sum()
    sided = 1 + np.floor(shares[1:] / 2 * (TOTAL - 2 * len(shares))).astype(np.int64)
    table = np.concatenate([sided[::-1], [TOTAL - 2 * sided.sum()], sided]).astype(np.uint16)
    return ClassCoder(table, centroids_M)


def first_coder(symbol_class: int) -> ClassCoder:
    """What training starts from, and falls back on where it has seen little: half Gaussian, half Laplacian."""
    counts = expected_counts(symbol_class)
    return frozen_coder(counts, torch.arange(len(counts), dtype=torch.float32))


def expected_counts(symbol_class: int) -> NDArray[np.float64]:
    """Shares of magnitudes 0..M that a coefficient of the class takes, by formula."""
    size = deviation(symbol_class)
    edges = [0.6 + m for m in range(largest_magnitude(symbol_class))]
    gaussian: Callable[[float], float] = lambda x: math.erfc(x / size / math.sqrt(2))  # noqa: E731
    above = np.array([1.0, *((gaussian(x) + math.exp(-math.sqrt(2) * x / size)) / 2 for x in edges), 0.0])
    shares: NDArray[np.float64] = np.maximum(above[:-1] - above[1:], 1e-12)
    return shares
