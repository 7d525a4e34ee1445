"""``powersgd``: every LoRA factor as a sum of few products of two vectors, both quantised.

Vogels et al. 2019, "PowerSGD: Practical Low-Rank Gradient Compression for Distributed Optimization". A component of a
block ``[R, W]`` is a direction in the rank (``R`` values) times a row (``W`` values).

Departures, all in the peer's favour: an exact decomposition in place of a step of power iteration; quantised vectors
in place of floats; not one rank for all, but bits given one by one to the components where they remove most energy per
byte (a component's width of 0 leaves it out); the rows are fitted again to the quantised directions.

    offset  size  field
    0       1     how many of 32 blocks have no component, rounded
    1       -     range-coded: widths of all components; then per block its directions, scales (bfloat16) and rows

Shape suffixes: R rank, W width of one block, B blocks, K components of a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradcodec.codec import WithoutSideInformation, codec_id
from gradcodec.entropy import SymbolReader, Symbols, Table, bits_of, encode_symbols, integer_table, uniform_table
from gradcodec.errors import BudgetError, CodecError
from gradcodec.frame import Codes
from gradcodec.layout import Block, Layout
from gradcodec.peers.packing import (
    Floats,
    budget_of,
    finite,
    gaussian_codebook,
    least_squares_scale,
    nearest,
)

MAX_ROW_BITS = 6
_SCALE_BITS = 16
_DISTORTION = (1.0, 0.3634, 0.1175, 0.03454, 0.009497, 0.0025, 0.00064)
"""Of a Gaussian quantised to so many bits, over its energy (Max 1960, table I)."""
_LARGEST_SCALE = 1e37
_LAST_WORD_BYTES = 4
_LOOK_AHEAD = 64
_ZEROS = 32
_NEXT_WIDTH = [integer_table(np.array([0.5**step for step in range(max(width, 1) + 1)])) for width in range(7)]
"""By the width of the component before, how much narrower the next one is."""

Doubles = NDArray[np.float64]
Widths = NDArray[np.int32]
Grants = NDArray[np.int64]


@dataclass(frozen=True)
class PowersgdCodec(WithoutSideInformation):
    """``powersgd``: any rate up to 6 bits, in steps of one bit for one row."""

    layout: Layout
    id: bytes = codec_id("powersgd/1")
    num_streams: int = 1

    def encode(self, blocks_RC: Tensor, max_bytes: int | None, side: Tensor | None) -> Codes:
        max_bytes = budget_of(max_bytes, self.layout.num_parameters)
        blocks_RC = blocks_RC.cpu()
        parts = [blocks_RC[: b.rank, b.start : b.stop].double().numpy() for b in self.layout.blocks]
        directions, energies_BR = self._decompose(parts)
        grants = self._grants(energies_BR)
        for count in range(*self._most(grants, 8 * (max_bytes - 1))):
            chosen = self._filled_up(grants, count, 8 * (max_bytes - 1 - _LAST_WORD_BYTES))
            codes = self._write(parts, directions, self._widths(chosen))
            if len(codes) <= max_bytes:
                return (codes,)
        raise BudgetError(f"{max_bytes} bytes for the codes; powersgd needs at least {len(codes)}")

    def decode(self, codes: Codes, side: Tensor | None) -> Tensor:
        if not codes[0] or codes[0][0] > _ZEROS:
            raise CodecError("the codes hold no share of silent blocks")
        reader = SymbolReader(codes[0][1:])
        widths_BR = self._read_widths(reader, codes[0][0])
        blocks_RC = torch.zeros(self.layout.rank, self.layout.num_columns)
        for block, widths in zip(self.layout.blocks, widths_BR, strict=True):
            kept = widths[widths > 0].tolist()
            directions_KR = np.stack([_read_direction(reader, w, block.rank) for w in kept]) if kept else None
            if directions_KR is None:
                continue
            rows_KW = np.stack([_read_row(reader, w, block.width) for w in kept])
            blocks_RC[: block.rank, block.start : block.stop] = torch.from_numpy(directions_KR.T @ rows_KW)
        finite(blocks_RC.numpy())
        return blocks_RC

    def _most(self, grants: Grants, max_bits: int) -> tuple[int, int, int]:
        """Range from the largest number of grants that fits, by the tables' prices, down to none: the range coder's
        last word may go over."""
        low, high = 0, len(grants)
        while low < high:
            middle = (low + high + 1) // 2
            fits = self._bits(self._widths(grants[:middle])) <= max_bits
            low, high = (middle, high) if fits else (low, middle - 1)
        return low, -1, -1

    def _filled_up(self, grants: Grants, count: int, max_bits: int) -> Grants:
        """The first ``count`` grants, and of the next ones those that still fit."""
        chosen = grants[:count]
        for next_grant in range(count, min(count + _LOOK_AHEAD, len(grants))):
            more = np.append(chosen, grants[next_grant])
            if self._bits(self._widths(more)) <= max_bits:
                chosen = more
        return chosen

    def _decompose(self, parts: list[Doubles]) -> tuple[list[Doubles], Doubles]:
        """Per block its principal directions as rows, strongest first, and their energies ``[B, R]``."""
        directions: list[Doubles] = []
        energies_BR = np.zeros((len(parts), self.layout.rank))
        for energies, part in zip(energies_BR, parts, strict=True):
            found, axes = np.linalg.eigh(part @ part.T)
            directions.append(axes.T[::-1])
            energies[: len(part)] = np.maximum(found[::-1], 0)
        return directions, energies_BR

    def _grants(self, energies_BR: Doubles) -> Grants:
        """Components, as places in ``[B, R]``, each as often as it may get a bit; best energy per bit first."""
        shape = (*energies_BR.shape, MAX_ROW_BITS)
        prices = np.diff(self._prices)
        worth = energies_BR[:, :, None] * -np.diff(_DISTORTION) / prices[:, None, :]
        worth = np.minimum.accumulate(np.minimum.accumulate(worth, axis=2), axis=1).reshape(-1)
        places = np.repeat(np.arange(energies_BR.size), MAX_ROW_BITS).reshape(shape).reshape(-1)
        order = np.argsort(-worth, kind="stable")
        return places[order[: np.count_nonzero(worth > 0)]]

    def _widths(self, grants: Grants) -> Widths:
        """Bits of every component's row, ``[B, R]``; never more than of the component before."""
        size = len(self.layout.blocks) * self.layout.rank
        widths_BR = np.bincount(grants, minlength=size).astype(np.int32).reshape(-1, self.layout.rank)
        return np.minimum.accumulate(widths_BR, axis=1)

    def _bits(self, widths_BR: Widths) -> float:
        own = sum(float(bits_of(table)[symbols].sum()) for symbols, table in self._width_parts(widths_BR))
        return own + float(np.take_along_axis(self._prices, widths_BR.astype(np.int64), axis=1).sum())

    def _width_parts(self, widths_BR: Widths) -> list[tuple[Symbols, Table]]:
        parts = [(widths_BR[:, 0], _first_width(_share_of_zeros(widths_BR)))]
        for rank in range(1, self.layout.rank):
            for before in range(1, MAX_ROW_BITS + 1):
                chosen = self._live(rank) & (widths_BR[:, rank - 1] == before)
                parts.append((before - widths_BR[chosen, rank], _NEXT_WIDTH[before]))
        return parts

    def _read_widths(self, reader: SymbolReader, zeros: int) -> Widths:
        widths_BR = np.zeros((len(self.layout.blocks), self.layout.rank), np.int32)
        widths_BR[:, 0] = reader.read(len(widths_BR), _first_width(zeros))
        for rank in range(1, self.layout.rank):
            for before in range(1, MAX_ROW_BITS + 1):
                chosen = self._live(rank) & (widths_BR[:, rank - 1] == before)
                widths_BR[chosen, rank] = before - reader.read(int(chosen.sum()), _NEXT_WIDTH[before])
        return widths_BR

    @cached_property
    def _prices(self) -> Grants:
        """Bits of a component by block and width, ``[B, MAX_ROW_BITS + 1]``."""
        return np.array([[_price(b, width) for width in range(MAX_ROW_BITS + 1)] for b in self.layout.blocks])

    def _live(self, rank: int) -> NDArray[np.bool_]:
        return np.array([block.rank > rank for block in self.layout.blocks])

    def _write(self, parts: list[Doubles], directions: list[Doubles], widths_BR: Widths) -> bytes:
        symbols = self._width_parts(widths_BR)
        for part, axes, widths in zip(parts, directions, widths_BR, strict=True):
            kept = widths[widths > 0].tolist()
            coded = [_direction_symbols(axis, width) for axis, width in zip(axes, kept, strict=False)]
            symbols += [(s, uniform_table(_direction_bits(w))) for s, w in zip(coded, kept, strict=True)]
            if kept:
                sent_KR = np.stack([_direction(s, w) for s, w in zip(coded, kept, strict=True)]).astype(np.float64)
                rows_KW = np.linalg.lstsq(sent_KR.T, part, rcond=None)[0].astype(np.float32)
                for row, width in zip(rows_KW, kept, strict=True):
                    symbols += _row_parts(row, width)
        return bytes([_share_of_zeros(widths_BR)]) + encode_symbols(symbols)


def _price(block: Block, width: int) -> int:
    """Bits of a component's direction, scale and row."""
    return 0 if width == 0 else block.rank * _direction_bits(width) + _SCALE_BITS + block.width * width


def _direction_bits(width: int) -> int:
    return min(width + 4, 8)


def _direction_symbols(axis: Doubles, width: int) -> Symbols:
    top = (1 << _direction_bits(width)) - 1
    return np.rint((axis + 1) / 2 * top).clip(0, top).astype(np.int32)


def _direction(symbols: Symbols, width: int) -> Floats:
    top = (1 << _direction_bits(width)) - 1
    return symbols.astype(np.float32) * np.float32(2 / top) - np.float32(1)


def _read_direction(reader: SymbolReader, width: int, rank: int) -> Floats:
    return _direction(reader.read(rank, uniform_table(_direction_bits(width))), width)


def _row_parts(row: Floats, width: int) -> list[tuple[Symbols, Table]]:
    book = gaussian_codebook(width)
    rms = np.float32(np.sqrt(np.mean(np.square(row, dtype=np.float64))))
    indices = nearest(row / rms if rms > 0 else row, book)
    scale = int(np.float32(least_squares_scale(row, book[indices])).view(np.uint32) >> 16)
    halves = np.array([scale >> 8, scale & 255], np.int32)
    return [(halves, uniform_table(8)), (indices.astype(np.int32), uniform_table(width))]


def _read_row(reader: SymbolReader, width: int, num_values: int) -> Floats:
    high, low = reader.read(2, uniform_table(8)).tolist()
    scale = np.array([(high << 24) | (low << 16)], np.uint32).view(np.float32)
    if not np.abs(scale) <= _LARGEST_SCALE:
        raise CodecError(f"a row's scale of {scale.item()} is out of range")
    return gaussian_codebook(width)[reader.read(num_values, uniform_table(width))] * scale


def _share_of_zeros(widths_BR: Widths) -> int:
    return int(_ZEROS * np.count_nonzero(widths_BR[:, 0] == 0) // len(widths_BR))


def _first_width(zeros: int) -> Table:
    """Of the first component of a block, when so many of 32 blocks have none."""
    return integer_table(np.array([6 * (2 * zeros + 1), *[2 * (_ZEROS - zeros) + 1] * MAX_ROW_BITS], np.float64))
