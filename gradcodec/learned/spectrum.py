"""Spectrum: how strong every coefficient is expected to be, as integers that both ends derive alike.

A *level* is an energy in steps of 1.5 dB. What is expected is frozen in the artifact: per tensor a level for each row
and one for each column. What a payload may add: a *tilt*, one correction a segment of the columns of all A and of all
B factors, and a correction a row, each sent only where it saves more bits than it costs.

Shape suffixes: R rank, C columns of all blocks, W width of one block, N rows of all blocks, S segments.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradcodec.entropy import TOTAL, SymbolReader, Symbols, Table, bits_of, integer_table
from gradcodec.layout import Block, Layout

LEVELS_PER_OCTAVE = 2  # an octave of energy, 3 dB, is two levels
NUM_SEGMENTS = 8
MAX_CORRECTION = 24
LOWEST_LEVEL = -8192
_MAX_STEP = 2 * MAX_CORRECTION
_KINDS = 2  # A, B
_SHAPES = ((Fraction(1, 64), 2), (Fraction(1, 16), 2), (Fraction(1, 4), 1), (Fraction(1, 2), 2), (Fraction(4, 5), 4))
"""Tables for steps from row to row: the share of rows that take one, and over how many sizes it halves."""

Levels = NDArray[np.int16]
Doubles = NDArray[np.float64]


@dataclass(frozen=True)
class Expected:
    """What TGAP knows of one tensor: levels of its rows ``[R]`` and of its columns' coefficients ``[K + 1]``, those
    of the K leading directions and one for all that follow."""

    rows: tuple[int, ...]
    columns: tuple[int, ...]


@dataclass(frozen=True)
class Corrections:
    """What a payload says of its spectrum: levels added to segments ``[2, S]`` and to rows ``[N]``."""

    tilt: Levels
    rows: Levels


class Spectrum:
    """Expected levels of one layout. What has as many values as the update lies on ``device``, all else on the host."""

    def __init__(
        self,
        layout: Layout,
        expected: Mapping[str, Expected],
        any_rows: Sequence[int],
        device: torch.device | str = "cpu",
    ) -> None:
        """``any_rows``: levels of rows by rank, for tensors that TGAP did not see."""
        blocks = layout.blocks
        self.layout = layout
        self._rows_N = np.concatenate([_rows_of(block, expected.get(block.name), any_rows) for block in blocks])
        columns_C = np.concatenate([_columns_of(block, expected.get(block.name)) for block in blocks])
        self._columns_C = torch.from_numpy(columns_C).to(device)
        bounds = [[b.start + round(i * b.width / NUM_SEGMENTS) for i in range(NUM_SEGMENTS)] for b in blocks]
        stops = [[*starts[1:], b.stop] for starts, b in zip(bounds, blocks, strict=True)]
        self._segment_widths_BS = np.array(stops) - np.array(bounds)
        self._starts_BS = np.array(bounds)
        self._kind_B = np.array([int(block.transposed) for block in blocks])
        self._block_N = np.repeat(np.arange(len(blocks)), [block.rank for block in blocks])
        self.rank_N = np.concatenate([np.arange(block.rank) for block in blocks])

    def levels(self, corrections: Corrections, stride: int = 1) -> Iterator[Tensor]:
        """Row by row the expected levels of the coefficients in every so many-th column, int16, ``[C]`` if ``stride``
        is 1; where a block lacks the row it is the lowest level."""
        rows_RB = np.full((self.layout.rank, len(self.layout.blocks)), LOWEST_LEVEL, np.int16)
        rows_RB[self.rank_N, self._block_N] = self._rows_N + corrections.rows
        segments_RBS = rows_RB[:, :, None] + corrections.tilt[self._kind_B]
        columns_C = self._columns_C[::stride]
        # how many of the columns 0, stride, 2 * stride ... lie in a segment
        counts_BS = -(-(self._starts_BS + self._segment_widths_BS) // stride) + self._starts_BS // -stride
        repeats = torch.from_numpy(counts_BS.reshape(-1)).to(columns_C.device)
        for row in torch.from_numpy(segments_RBS.reshape(len(rows_RB), -1)).to(columns_C.device):
            yield row.repeat_interleave(repeats, output_size=len(columns_C)) + columns_C

    @property
    def num_rows(self) -> int:
        return len(self._rows_N)

    def nothing(self) -> Corrections:
        return Corrections(np.zeros((_KINDS, NUM_SEGMENTS), np.int16), np.zeros(self.num_rows, np.int16))

    def energies(self, coefficients_RC: Tensor) -> Doubles:
        """Coefficients ``[R, C]`` -> mean squares of segments, what is expected of columns divided out: ``[N, S]``."""
        whiten_C = torch.exp2(self._columns_C / (-2 * LEVELS_PER_OCTAVE))
        lengths = torch.from_numpy(self._segment_widths_BS.reshape(-1)).to(coefficients_RC.device)
        sums = coefficients_RC.new_empty(len(coefficients_RC), len(lengths), dtype=torch.float64)
        for row_C, sums_of_row in zip(coefficients_RC, sums, strict=True):
            sums_of_row.copy_(  # no name for the squares, which would keep them while the next ones are made
                torch.segment_reduce((row_C * whiten_C).square_().double(), "sum", lengths=lengths, unsafe=True)
            )
        sums_RBS = sums.cpu().numpy().reshape(len(sums), -1, NUM_SEGMENTS)
        found: Doubles = (sums_RBS / np.maximum(self._segment_widths_BS, 1))[self.rank_N, self._block_N]
        return found

    def fit(self, energies_NS: Doubles, step: float) -> tuple[Corrections, float]:
        """The corrections that pay, and the mean energy over what is then expected.

        Args:
            energies_NS: as ``energies`` gives them.
            step: the quantiser's. A coefficient weaker than it takes few bits, and a correction saves few of those.
        """
        widths_NS = self._segment_widths_BS[self._block_N].astype(np.float64)
        expected_N = np.exp2(self._rows_N / LEVELS_PER_OCTAVE)
        loudness = _mean_ratio(energies_NS, widths_NS, expected_N[:, None])
        corrections = self.nothing()
        if loudness <= 0:
            return corrections, 0.0
        tilt = np.zeros_like(corrections.tilt)
        for kind in range(_KINDS):
            mine = self._kind_B[self._block_N] == kind
            for segment in range(NUM_SEGMENTS if mine.any() else 0):
                here, widths = energies_NS[mine, segment, None], widths_NS[mine, segment, None]
                ratio = _mean_ratio(here, widths, expected_N[mine, None]) / loudness
                level = int(_levels_of(np.array(ratio)))
                num_live = float((widths[:, 0] * _liveness(expected_N[mine] * loudness * max(ratio, 1.0), step)).sum())
                if num_live * _BITS_LOST[level] > _TILT_BITS:
                    tilt[kind, segment] = level
        energies_NS = energies_NS / np.exp2(tilt[self._kind_B[self._block_N]] / LEVELS_PER_OCTAVE)
        row_means_N = (energies_NS * widths_NS).sum(1) / widths_NS.sum(1)
        own_N = _levels_of(row_means_N / (expected_N * loudness))
        widths_N = widths_NS.sum(1) * _liveness(np.maximum(row_means_N, expected_N * loudness), step)
        rows = np.zeros(self.num_rows, np.int16)
        before = 0
        for i, (own, width) in enumerate(zip(own_N.tolist(), widths_N.tolist(), strict=True)):
            if width * _BITS_LOST[own - before] > _ROW_BITS:
                before = own
            rows[i] = before
        corrected_N = expected_N * np.exp2(rows / LEVELS_PER_OCTAVE)
        return Corrections(tilt, rows), _mean_ratio(energies_NS, widths_NS, corrected_N[:, None])

    def pack(self, corrections: Corrections) -> list[tuple[Symbols, Table]]:
        """Corrections -> runs of symbols with their tables."""
        tilt = corrections.tilt.astype(np.int32).reshape(-1)
        rows = corrections.rows.astype(np.int32)
        steps: Symbols = rows - np.concatenate([[0], rows[:-1]]).astype(np.int32)
        shape = 1 + int(np.argmin([float(bits_of(table)[steps + _MAX_STEP].sum()) for table in _STEP_TABLES]))
        tilted, shape = int(bool(tilt.any())), shape if steps.any() else 0
        parts: list[tuple[Symbols, Table]] = [(np.array([tilted * (1 + len(_SHAPES)) + shape], np.int32), _KIND_TABLE)]
        if tilted:
            parts.append((tilt + MAX_CORRECTION, _TILT_TABLE))
        if shape:
            parts.append((steps + _MAX_STEP, _STEP_TABLES[shape - 1]))
        return parts

    def unpack(self, reader: SymbolReader) -> Corrections:
        """Inverse of ``pack``."""
        tilted, shape = divmod(int(reader.read(1, _KIND_TABLE)[0]), 1 + len(_SHAPES))
        found = self.nothing()
        tilt, rows = found.tilt, found.rows
        if tilted:
            tilt = (reader.read(tilt.size, _TILT_TABLE) - MAX_CORRECTION).reshape(tilt.shape).astype(np.int16)
        if shape:
            steps = reader.read(len(rows), _STEP_TABLES[shape - 1]) - _MAX_STEP
            rows = np.clip(np.cumsum(steps), -MAX_CORRECTION, MAX_CORRECTION).astype(np.int16)
        return Corrections(tilt, rows)


def _columns_of(block: Block, expected: Expected | None) -> Levels:
    if expected is None or len(expected.columns) > block.width:
        return np.zeros(block.width, np.int16)
    tail = [expected.columns[-1]] * (block.width - len(expected.columns))
    return np.array([*expected.columns, *tail], np.int16)


def _rows_of(block: Block, expected: Expected | None, any_rows: Sequence[int]) -> Levels:
    if expected is not None and len(expected.rows) == block.rank:
        return np.array(expected.rows, np.int16)
    tail = [any_rows[-1]] * max(block.rank - len(any_rows), 0)
    return np.array([*any_rows, *tail], np.int16)[: block.rank]


def _mean_ratio(energies: Doubles, widths: Doubles, expected: Doubles) -> float:
    """Mean energy over what is expected: the maximum-likelihood scale of Gaussians."""
    return float((energies * widths / expected).sum() / max(widths.sum(), 1.0))


def _liveness(energies: Doubles, step: float) -> Doubles:
    """How much a coefficient of that energy counts beside one that is coded at a high rate, 0 to 1."""
    counts: Doubles = np.minimum(energies / step**2, 1.0) ** 1.5
    return counts


def _levels_of(ratios: Doubles) -> NDArray[np.int64]:
    levels = np.rint(LEVELS_PER_OCTAVE * np.log2(np.clip(ratios, 2.0**-60, 2.0**60)))
    return np.asarray(np.clip(levels, -MAX_CORRECTION, MAX_CORRECTION), np.int64)


def _bits_lost(level: int) -> float:
    """Bits a coefficient that an entropy model loses if its Gaussian is off by so many levels (Kullback-Leibler)."""
    ratio = level / LEVELS_PER_OCTAVE * math.log(2)
    return (math.exp(min(ratio, 40.0)) - 1 - ratio) / (2 * math.log(2)) if level else 0.0


def _falling_table(limit: int, moved: Fraction, halving: int) -> Table:
    """A table for -limit..limit: ``moved`` is the share of what is not 0, halved every ``halving`` sizes. All in
    integers, so that both ends have the same."""
    weights = [Fraction(1, 2 ** (size // halving)) for size in range(limit)]
    sided = [moved / 2 * weight / sum(weights) for weight in weights]
    counts = [1 + int(share * (TOTAL - 2 * limit - 1)) for share in sided]
    return np.array([*counts[::-1], TOTAL - 2 * sum(counts), *counts], np.uint16)


_BITS_LOST = {level: _bits_lost(level) for level in range(-2 * MAX_CORRECTION, 2 * MAX_CORRECTION + 1)}
_TILT_BITS, _ROW_BITS = 5.0, 5.0
_KIND_TABLE = integer_table(np.ones(2 * (1 + len(_SHAPES))))
_TILT_TABLE = _falling_table(MAX_CORRECTION, Fraction(2, 3), 2)
_STEP_TABLES = [_falling_table(_MAX_STEP, moved, halving) for moved, halving in _SHAPES]
