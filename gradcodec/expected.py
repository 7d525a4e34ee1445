"""What is expected of coefficients: a basis that both ends have, the tables' levels in it, and what is announced.

A coefficient's level is the sum of the tables' (of its row and of its direction along the width), of what is announced
of its row, and of what is announced of its class of columns: half-octaves of directions, apart for A and B, over all
layers. The server finds both out from the sums that it decodes.

Shape suffixes: R rank, C columns, W width of one block, K directions, N coefficients or rows, G classes of columns, M
coefficients that are known.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

from gradcodec.announcement import Doubles, energies_of
from gradcodec.layout import Block, Layout
from gradcodec.learned.spectrum import Spectrum
from gradcodec.learned.tables import LearnedTables
from gradcodec.residues import Integers
from gradcodec.transform import Transform

FEW = 32.0
_FEW_OF_CLASS = 256.0
"""What was expected counts as so many values that were found. With 32 of a class, which all layers share, what is sent
narrows from round to round (docs/negative-results.md)."""
MOST_FALL = 2.0**10
"""By how much what is expected may fall in a round: a sum may be nearly nothing by chance."""
QUIETEST = 2.0**-60
"""An energy that stands for none."""
_TIE_BITS = 16
_TAIL = 15
NUM_CLASSES = 2 * (_TAIL + 1)
"""Classes of columns."""


class Basis:
    """Coefficients of one round: both ends build it from the same tables and side information."""

    def __init__(self, layout: Layout, tables: LearnedTables, side: Tensor | None) -> None:
        """
        Args:
            layout: of the adapter.
            tables: with the round's directions (``LearnedTables.for_directions``), or without any.
            side: the principal axes of the last global update, ``[B, R, R]``, or None.
        """
        self.layout = layout
        self._side = side
        self._transform = Transform(layout, tables.leading)
        self._spectrum = Spectrum(layout, tables.expected, tables.any_rows)
        widths = [block.width for block in layout.blocks for _ in range(block.rank)]
        self.row_of_N = np.repeat(np.arange(self.num_rows), widths)
        classes = [_classes_of(block, tables.leading.get(block.name)) for block in layout.blocks]
        self.class_of_N = np.concatenate([np.tile(c, b.rank) for c, b in zip(classes, layout.blocks, strict=True)])

    @property
    def num_rows(self) -> int:
        return self._spectrum.num_rows

    def analyse(self, blocks_RC: Tensor) -> Tensor:
        """Blocks ``[R, C]`` -> coefficients float32 ``[N]``."""
        return self.layout.flatten(self._transform.analyse(blocks_RC.cpu(), self._side))

    def synthesise(self, coefficients_N: Tensor) -> Tensor:
        """Inverse of ``analyse``."""
        return self._transform.synthesise(self.layout.unflatten(coefficients_N), self._side)

    def levels(self, rows_N: Integers, columns_G: Integers) -> Integers:
        """The expected level of every coefficient ``[N]``: the tables', and what is announced of its row and column."""
        corrections = self._spectrum.nothing()
        corrections.rows[:] = rows_N
        levels_RC = torch.stack([*self._spectrum.levels(corrections)])
        levels_N: Integers = self.layout.flatten(levels_RC).numpy().astype(np.int64) + columns_G[self.class_of_N]
        return levels_N

    def fit(self, start: tuple[Doubles, Doubles], places_M: Integers, energies_M: Doubles) -> tuple[Doubles, Doubles]:
        """What rows ``[N]`` and classes of columns ``[G]`` have over the tables' energies, after what was found.

        A row of which nothing is known follows all others. Such a class goes half of the way back to the tables: one
        that was once taken for weak is never sent, and would be taken for weak for ever.

        Args:
            start: what was expected of both.
            places_M: coefficients that are known, at least one.
            energies_M: theirs; noise may have made some negative.
        """
        rows_N, columns_G = start
        row_of_M, class_of_M = self.row_of_N[places_M], self.class_of_N[places_M]
        plain_M = energies_of(self._levels_of_tables()[places_M])
        usual = float(np.mean(energies_M / (plain_M * rows_N[row_of_M] * columns_G[class_of_M])))
        rows_N = rows_N * max(usual, 1 / MOST_FALL)
        columns_G = _drawn(energies_M / (plain_M * rows_N[row_of_M]), class_of_M, np.sqrt(columns_G), _FEW_OF_CLASS)
        rows_N = _drawn(energies_M / (plain_M * columns_G[class_of_M]), row_of_M, rows_N, FEW)
        return rows_N, columns_G

    def _levels_of_tables(self) -> Integers:
        return self.levels(np.zeros(self.num_rows, np.int64), np.zeros(NUM_CLASSES, np.int64))


def order_of(levels_N: Integers, seed: bytes) -> Integers:
    """Places of coefficients from the highest level to the lowest, equal ones in an order of the round's own."""
    ties_N = np.random.PCG64(number_of(seed + b"/order")).random_raw(-(-len(levels_N) // 4)).astype("<u8").view("<u2")
    return np.argsort((-levels_N << _TIE_BITS) + ties_N[: len(levels_N)], kind="stable")


def number_of(seed: bytes) -> int:
    """32 bits that stand for a seed of any length."""
    return int.from_bytes(hashlib.sha256(seed).digest()[:4], "little")


def _drawn(values_M: Doubles, group_of_M: Integers, expected: Doubles, few: float) -> Doubles:
    """Each group's mean, drawn towards what was expected of it as if that were ``few`` values more."""
    count = np.bincount(group_of_M, minlength=len(expected))
    found = np.bincount(group_of_M, values_M, minlength=len(expected))
    drawn: Doubles = np.maximum((found + few * expected) / (count + few), expected / MOST_FALL)
    return drawn


def _classes_of(block: Block, leading_WK: Tensor | None) -> Integers:
    """The class of every column of a block ``[W]``: half-octaves of leading directions, one class for all others,
    apart for A and B."""
    classes_W = np.full(block.width, _TAIL, np.int64)
    if leading_WK is not None:
        places_K = np.arange(1, leading_WK.shape[1] + 1)
        classes_W[: len(places_K)] = np.minimum(np.floor(2 * np.log2(places_K)).astype(np.int64), _TAIL - 1)
    return classes_W + int(block.transposed) * (_TAIL + 1)
