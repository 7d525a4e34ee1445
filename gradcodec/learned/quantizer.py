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

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradcodec.entropy import TOTAL, SymbolReader, Symbols, Table, bits_of, gamma_parts, read_gamma, uniform_table

MIN_CLASS, MAX_TABLED, MAX_CLASS = -8, 13, 40
"""Below the first, coefficients are silent; above the second, their lowest bits are sent as they are."""
CLASSES = range(MIN_CLASS, MAX_TABLED + 1)
PRICE_OF_A_BIT = 0.14
"""Lambda, in squared steps. ln(2) / 6 = 0.116 is what uniform steps trade at at a high rate."""
_MAX_MAGNITUDE = 40
_MAX_OCTAVE = 14
MAX_EXCESS = (1 << _MAX_OCTAVE + 1) - 2
"""Larger values are clipped; what is cut off stays in the residual."""

Integers = NDArray[np.int64]


def deviation(symbol_class: int) -> float:
    """Root of the energy that is expected of a class, in steps."""
    return float(2.0 ** (symbol_class / 4))


def largest_magnitude(symbol_class: int) -> int:
    """M: what a magnitude exceeds it by is sent apart (``excess``)."""
    return min(_MAX_MAGNITUDE, 3 + math.ceil(8 * deviation(symbol_class)))


@dataclass(frozen=True)
class ClassCoder:
    """One class: frequencies of its symbols -M..M, and the centroids of their magnitudes in steps, ``[M + 1]``."""

    table: Table
    centroids_M: Tensor

    @property
    def largest(self) -> int:
        return len(self.centroids_M) - 1

    def thresholds(self) -> Tensor:
        """Where magnitude m turns into m + 1, in steps, ``[M]``; never falling."""
        bits_M = torch.from_numpy(bits_of(self.table)[self.largest :]).float()
        between_M = (self.centroids_M[1:] + self.centroids_M[:-1]) / 2
        gap_M = (self.centroids_M[1:] - self.centroids_M[:-1]).clamp_min(1e-3)
        return torch.cummax(between_M + PRICE_OF_A_BIT * (bits_M[1:] - bits_M[:-1]) / (2 * gap_M), dim=0).values


class Quantizer:
    """All classes. ``quantize`` and ``restore`` are inverse up to the step."""

    def __init__(self, coders: dict[int, ClassCoder], device: torch.device | str = "cpu") -> None:
        """Values and integers lie on ``device``; ``pack`` and ``unpack`` are the host's."""
        assert coders.keys() == set(CLASSES)
        self.coders = coders
        self._thresholds = {c: coder.thresholds().to(device) for c, coder in coders.items()}
        self._centroids = {c: coder.centroids_M.to(device) for c, coder in coders.items()}
        self._bits = {c: torch.from_numpy(bits_of(coder.table)).float().to(device) for c, coder in coders.items()}

    def quantize(self, values_N: Tensor, symbol_class: int) -> Tensor:
        """Values in steps -> integers ``[N]`` int32: symbols, in the highest classes their low bits behind them."""
        coder, low_bits = self.coders[_tabled(symbol_class)], num_low_bits(symbol_class)
        if low_bits:
            largest = coder.largest + MAX_EXCESS << low_bits
            return values_N.round().clamp(-largest, largest).int() + (1 << low_bits - 1)
        sizes_N = values_N.abs()
        magnitudes_N = torch.bucketize(sizes_N, self._thresholds[symbol_class], out_int32=True)
        outliers = magnitudes_N == coder.largest
        excess = (sizes_N[outliers] - self._centroids[symbol_class][-1]).round().clamp(0, MAX_EXCESS)
        magnitudes_N[outliers] += excess.int()
        return torch.where(values_N < 0, -magnitudes_N, magnitudes_N)

    def restore(self, integers_N: Tensor, symbol_class: int) -> Tensor:
        """Inverse of ``quantize``, ``[N]`` float32 in steps."""
        if low_bits := num_low_bits(symbol_class):
            return (integers_N - (1 << low_bits - 1)).float()
        coder = self.coders[symbol_class]
        magnitudes_N = integers_N.abs()
        sizes_N = self._centroids[symbol_class][magnitudes_N.clamp_max(coder.largest)]
        return (sizes_N + (magnitudes_N - coder.largest).clamp_min(0)) * integers_N.sign()

    def num_bits(self, integers_N: Tensor, symbol_class: int) -> float:
        """What symbols and low bits take."""
        bits_M = self._bits[_tabled(symbol_class)]
        symbols_N = integers_N >> num_low_bits(symbol_class)
        largest = len(bits_M) // 2
        counts_M = torch.bincount(symbols_N.clamp(-largest, largest) + largest, minlength=len(bits_M))
        excess = symbols_N.abs() - largest
        excess_bits = float((2 * torch.log2(excess[excess >= 0] + 1.0) + 1).sum())
        return float(counts_M.float() @ bits_M) + excess_bits + num_low_bits(symbol_class) * len(symbols_N)

    def pack(self, integers_N: Symbols, symbol_class: int) -> list[tuple[Symbols, Table]]:
        """What ``quantize`` gave -> runs of symbols with their tables."""
        coder, low_bits = self.coders[_tabled(symbol_class)], num_low_bits(symbol_class)
        largest = coder.largest
        signed: Symbols = integers_N >> low_bits
        parts = [(np.clip(signed, -largest, largest) + np.int32(largest), coder.table)]
        outliers = np.abs(signed[np.abs(signed) >= largest])
        parts += gamma_parts(outliers - np.int32(largest - 1), _EXCESS_LENGTHS)
        if low_bits:
            parts.append((integers_N & np.int32((1 << low_bits) - 1), uniform_table(low_bits)))
        return parts

    def unpack(self, reader: SymbolReader, count: int, symbol_class: int) -> Symbols:
        """Inverse of ``pack``."""
        coder, low_bits = self.coders[_tabled(symbol_class)], num_low_bits(symbol_class)
        signed: Symbols = reader.read(count, coder.table) - np.int32(coder.largest)
        outliers = np.flatnonzero(np.abs(signed) == coder.largest)
        excess = read_gamma(reader, len(outliers), _EXCESS_LENGTHS) - 1
        signed[outliers] += np.sign(signed[outliers]) * excess
        return (signed << low_bits) + reader.read(count, uniform_table(low_bits)) if low_bits else signed


def num_low_bits(symbol_class: int) -> int:
    """How many of a magnitude's lowest bits a class sends as they are: at such rates they are uniform."""
    return max(0, math.ceil((symbol_class - MAX_TABLED) / 4))


_EXCESS_LENGTHS = np.array([(1 << 15) + 2, *(1 << 15 - n for n in range(1, _MAX_OCTAVE + 1))], np.uint16)


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
