"""The linear half of the learned codec: analysis (blocks -> coefficients) and synthesis (back), both orthogonal.

Along the rank every block is rotated into shared principal axes (``gauge.py``). Along the width it is rotated into a
basis that TGAP learned for this tensor: A's gradients lie where the layer's inputs do, B's where its output gradients
do, and both directions hold over rounds and clients. The basis is sorted by energy and cut into segments; how far a
segment lies above or below the row's mean energy is frozen with it, so that it costs no bytes.

A tensor that TGAP did not see, or saw with another width, keeps its own columns: the codec serves it all the same.

Shape suffixes: R rank, C columns of all blocks, W width of one block, N recorded updates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from gradcodec.errors import CodecError
from gradcodec.gauge import rotate, unrotate
from gradcodec.layout import Block, Layout

NUM_SEGMENTS = 8
MAX_OFFSET = 16
"""Largest distance of a segment from its row's mean energy, in levels of 1.5 dB."""
MAX_BASIS_WIDTH = 1024
"""Wider blocks keep their columns: a basis takes ``width ** 2`` values."""


@dataclass(frozen=True)
class WidthBasis:
    """An orthogonal basis ``[W, W]``, columns sorted by energy; per segment its energy in levels over the mean."""

    basis_WW: Tensor
    offsets: tuple[int, ...]


@dataclass(frozen=True)
class Row:
    """One row of one block's coefficients: its scale is sent once."""

    rank: int
    start: int
    stop: int


@dataclass(frozen=True)
class Piece:
    """One segment of one row: columns ``start:stop``, ``offset`` levels above the row."""

    row: int
    rank: int
    start: int
    stop: int
    offset: int


class Transform:
    """Analysis and synthesis for one layout."""

    def __init__(self, layout: Layout, bases: Mapping[str, WidthBasis]) -> None:
        self.layout = layout
        self._bases = [self._fitting(block, bases.get(block.name)) for block in layout.blocks]
        self.rows: list[Row] = []
        self.pieces: list[Piece] = []
        for block, basis in zip(layout.blocks, self._bases, strict=True):
            offsets = (0,) if basis is None else basis.offsets
            bounds = segment_bounds(block.width, len(offsets))
            for rank in range(block.rank):
                for offset, start, stop in zip(offsets, bounds[:-1], bounds[1:], strict=True):
                    self.pieces.append(Piece(len(self.rows), rank, block.start + start, block.start + stop, offset))
                self.rows.append(Row(rank, block.start, block.stop))
        self.largest_offset = [0] * len(self.rows)
        for piece in self.pieces:
            self.largest_offset[piece.row] = max(self.largest_offset[piece.row], piece.offset)

    def analyse(self, blocks_RC: Tensor, side: Tensor | None) -> Tensor:
        """Blocks -> coefficients, ``[R, C]`` both."""
        rotated_RC = rotate(blocks_RC, self._axes(side), self.layout)
        return self._along_width(rotated_RC, inverse=False)

    def synthesise(self, coefficients_RC: Tensor, side: Tensor | None) -> Tensor:
        """Coefficients -> blocks; inverse of ``analyse``."""
        rotated_RC = self._along_width(coefficients_RC, inverse=True)
        return unrotate(rotated_RC, self._axes(side), self.layout)

    def row_exponents(self, coefficients_RC: Tensor) -> list[int]:
        """Per row the rounded base-2 logarithm of its mean square, its segments' offsets taken out."""
        sums = [0.0] * len(self.rows)
        for piece in self.pieces:
            energy = float(coefficients_RC[piece.rank, piece.start : piece.stop].square().sum())
            sums[piece.row] += energy * 2.0 ** (-piece.offset / 2)
        means = [total / (row.stop - row.start) for total, row in zip(sums, self.rows, strict=True)]
        return [round(math.log2(min(max(mean, 2.0**-120), 2.0**120))) for mean in means]

    def _along_width(self, matrix_RC: Tensor, inverse: bool) -> Tensor:
        turned = []
        for block, basis in zip(self.layout.blocks, self._bases, strict=True):
            part = matrix_RC[:, block.start : block.stop]
            if basis is not None:
                part = part @ (basis.basis_WW.T if inverse else basis.basis_WW)
            turned.append(part)
        return torch.cat(turned, dim=1)

    def _axes(self, side: Tensor | None) -> Tensor:
        shape = (len(self.layout.blocks), self.layout.rank, self.layout.rank)
        if side is None:
            return torch.eye(self.layout.rank).expand(shape)
        if tuple(side.shape) != shape or not bool(torch.isfinite(side).all()):
            raise CodecError(f"side information of shape {tuple(side.shape)}: finite values of shape {shape} expected")
        return side

    @staticmethod
    def _fitting(block: Block, basis: WidthBasis | None) -> WidthBasis | None:
        return basis if basis is not None and len(basis.basis_WW) == block.width else None


def segment_bounds(width: int, count: int) -> list[int]:
    """Where the segments of a row begin and end: ``count + 1`` columns from 0 to ``width``."""
    return [round(i * width / count) for i in range(count + 1)]


def fit_bases(updates: Sequence[Tensor], layout: Layout) -> dict[str, WidthBasis]:
    """Learns the bases from recorded blocks ``[R, C]``.

    The offsets are cross-fitted, a basis from one half of the updates measured on the other, so that they promise no
    energy compaction that new updates would not show.
    """
    bases: dict[str, WidthBasis] = {}
    for block in layout.blocks:
        if not NUM_SEGMENTS * 8 <= block.width <= MAX_BASIS_WIDTH:
            continue
        parts = [update[: block.rank, block.start : block.stop].double() for update in updates]
        parts = [part / part.norm() for part in parts if float(part.norm()) > 0]
        if len(parts) < 2:
            continue
        one, other = (sum(p.T @ p for p in parts[i::2]) for i in (0, 1))
        assert isinstance(one, Tensor)
        assert isinstance(other, Tensor)
        energy_W = (_spread(one, other) + _spread(other, one)) / 2
        bounds = segment_bounds(block.width, NUM_SEGMENTS)
        means = torch.stack([energy_W[a:b].mean() for a, b in pairwise(bounds)])
        offsets = (2 * torch.log2(means / energy_W.mean())).round().clamp(-MAX_OFFSET, MAX_OFFSET)
        basis_WW = torch.linalg.eigh(one + other)[1].flip(1).half().float()
        bases[block.name] = WidthBasis(basis_WW.contiguous(), tuple(int(offset) for offset in offsets))
    return bases


def _spread(of: Tensor, measured_on: Tensor) -> Tensor:
    """Energy of one covariance along the principal axes of another, ``[W]``, strongest axis first."""
    axes = torch.linalg.eigh(of)[1].flip(1)
    energy: Tensor = (axes.T @ measured_on @ axes).diagonal() / measured_on.trace()
    return energy
