"""The learned codec: rotation, scales, vectors found by search, everything entropy-coded.

    blocks -> rotate into shared principal axes (gauge.py)
           -> one scale a row, in steps of 3 dB
           -> reverse water-filling: a row's level = its energy over the allowed distortion (the water mark);
              rows below the lowest level are silent
           -> codewords by search (codebooks.py) -> range coder (entropy.py)

One artifact serves every budget and every geometry: only the water mark changes. Departures from the paper: its
ResNet over a picture of all factors carries no client information (``docs/negative-results.md``).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradcodec.artifact import Artifact
from gradcodec.autoencoder.codebooks import (
    LEVELS_PER_OCTAVE,
    MAX_LEVEL,
    MIN_LEVEL,
    Codebook,
    band_of,
    price_of_a_bit,
)
from gradcodec.codec import codec_id
from gradcodec.entropy import SymbolReader, Symbols, Table, bits_of, encode_symbols, integer_table
from gradcodec.errors import BudgetError, CodecError
from gradcodec.frame import Codes
from gradcodec.gauge import principal_axes, rotate, unrotate
from gradcodec.layout import Layout

SILENT = 31
"""Scale symbol of a row that is not sent; 0 to 30 are steps of 3 dB below the strongest row."""
_HEADER = struct.Struct("<hh")  # exponent of the strongest row's energy, water mark in levels
_MAX_EXPONENT = 120
_FINEST_PRICE, _COARSEST_PRICE = 0.25, 16.0


@dataclass(frozen=True)
class LearnedTables:
    """All that the codec learned: a codebook a level, and how often each scale symbol occurs."""

    codebooks: Mapping[int, Codebook]
    scale_table: Table

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> LearnedTables:
        """Raises CodecError: a tensor is missing or of another shape."""
        codebooks: dict[int, Codebook] = {}
        for level in range(MIN_LEVEL, MAX_LEVEL + 1):
            codewords_KD = _checked(tensors, f"codewords.{level}", 2).float()
            table = _table(tensors, f"frequencies.{level}", len(codewords_KD))
            if codewords_KD.shape[1] != band_of(level).length:
                raise CodecError(f"artifact tensor 'codewords.{level}' has vectors of {codewords_KD.shape[1]} values")
            codebooks[level] = Codebook(codewords_KD, table, torch.from_numpy(bits_of(table)).float())
        return cls(codebooks, _table(tensors, "frequencies.scale", SILENT + 1))

    def to_tensors(self) -> dict[str, Tensor]:
        """Inverse of ``from_tensors``."""
        tensors = {"frequencies.scale": torch.from_numpy(self.scale_table.astype(np.int32))}
        for level, book in self.codebooks.items():
            tensors[f"codewords.{level}"] = book.codewords_KD.contiguous()
            tensors[f"frequencies.{level}"] = torch.from_numpy(book.table.astype(np.int32))
        return tensors


def _checked(tensors: Mapping[str, Tensor], key: str, num_dimensions: int) -> Tensor:
    if key not in tensors:
        raise CodecError(f"the artifact lacks tensor {key!r}: it was made by another version")
    if tensors[key].ndim != num_dimensions:
        raise CodecError(f"artifact tensor {key!r} has shape {tuple(tensors[key].shape)}")
    return tensors[key]


def _table(tensors: Mapping[str, Tensor], key: str, size: int) -> Table:
    frequencies = _checked(tensors, key, 1).numpy()
    if len(frequencies) != size or frequencies.min() < 1 or frequencies.sum() != 1 << 16:
        raise CodecError(f"artifact tensor {key!r} is no frequency table of {size} symbols")
    return frequencies.astype(np.uint16)


@dataclass(frozen=True)
class Row:
    """One rotated row of one block: row ``rank``, columns ``start:stop`` of the blocks matrix."""

    rank: int
    start: int
    stop: int


@dataclass(frozen=True)
class _Plan:
    """What both ends derive from header and scale symbols: each coded level's rows, lowest level first."""

    rows_of_level: dict[int, list[int]]

    @classmethod
    def of(cls, scales: Symbols, water_mark: int) -> _Plan:
        rows: dict[int, list[int]] = {}
        for index, symbol in enumerate(scales.tolist()):
            level = -LEVELS_PER_OCTAVE * symbol - water_mark
            if symbol != SILENT and level >= MIN_LEVEL:
                rows.setdefault(min(level, MAX_LEVEL), []).append(index)
        return cls(dict(sorted(rows.items())))


class LearnedCodec:
    """``learned``: see the module. Serves budgets down to the scales' cost, a few bits a row."""

    num_streams = 1

    def __init__(self, layout: Layout, tables: LearnedTables, weights_digest: bytes) -> None:
        self.layout = layout
        self.tables = tables
        self.id = codec_id("learned/1", weights_digest)
        self._rows = [Row(rank, b.start, b.stop) for b in layout.blocks for rank in range(b.rank)]

    @classmethod
    def from_artifact(cls, artifact: Artifact, layout: Layout) -> LearnedCodec:
        """Serves any layout. Raises CodecError: the artifact's tensors are not this codec's."""
        return cls(layout, LearnedTables.from_tensors(artifact.tensors), bytes.fromhex(artifact.digest))

    def side_information(self, global_update_RC: Tensor) -> Tensor | None:
        """Principal axes of the last global update, ``[B, R, R]`` float32."""
        return principal_axes(global_update_RC, self.layout)

    def encode(self, blocks_RC: Tensor, max_bytes: int | None, side: Tensor | None) -> Codes:
        rotated_RC = rotate(blocks_RC, self._axes(side), self.layout)
        exponents = self._exponents(rotated_RC)
        top = max(exponents, default=-_MAX_EXPONENT)
        symbols = [min(top - exponent, SILENT) for exponent in exponents]
        if max_bytes is not None and max_bytes < len(silence := self._silence()):
            raise BudgetError(f"{max_bytes} bytes for the codes; the learned codec needs at least {len(silence)}")

        def attempt(water_mark: int, price: float) -> bytes:
            return self._write(rotated_RC, np.array(symbols, np.int32), top, water_mark, price)

        if top <= -_MAX_EXPONENT:
            return (self._silence(),)
        if max_bytes is None:
            return (attempt(-MAX_LEVEL, 1.0),)
        return (self._fill(attempt, max_bytes),)

    def decode(self, codes: Codes, side: Tensor | None) -> Tensor:
        axes_BRR = self._axes(side)
        if len(codes[0]) < _HEADER.size:
            raise CodecError(f"{len(codes[0])} bytes of codes: the header alone takes {_HEADER.size}")
        top, water_mark = _HEADER.unpack_from(codes[0])
        if abs(top) > _MAX_EXPONENT or not -MAX_LEVEL <= water_mark <= -MIN_LEVEL + LEVELS_PER_OCTAVE:
            raise CodecError(f"scale exponent {top} or water mark {water_mark} out of range")
        reader = SymbolReader(codes[0][_HEADER.size :])
        scales = reader.read(len(self._rows), self.tables.scale_table)
        rotated_RC = torch.zeros(self.layout.rank, self.layout.num_columns)
        for level, indices in _Plan.of(scales, water_mark).rows_of_level.items():
            book = self.tables.codebooks[level]
            counts = [self._num_vectors(index, level) for index in indices]
            chosen = torch.from_numpy(reader.read(sum(counts), book.table).astype(np.int64))
            for index, vectors_ND in zip(indices, book.codewords_KD[chosen].split(counts), strict=True):
                row = self._rows[index]
                scale = _scale(top - int(scales[index]))
                rotated_RC[row.rank, row.start : row.stop] = vectors_ND.flatten()[: row.stop - row.start] * scale
        return unrotate(rotated_RC, axes_BRR, self.layout)

    def _fill(self, attempt: Callable[[int, float], bytes], max_bytes: int) -> bytes:
        """The best codes that fit: the lowest water mark, then the lowest price of a bit at that mark."""
        low, high = -MAX_LEVEL, -MIN_LEVEL + LEVELS_PER_OCTAVE  # `high` leaves every row silent: it always fits
        best = self._silence()
        while low < high:
            middle = (low + high) // 2
            codes = attempt(middle, 1.0)
            if len(codes) <= max_bytes:
                high, best = middle, codes
            else:
                low = middle + 1
        mark = max(high - 1, -MAX_LEVEL)
        cheap, dear = 1.0, _COARSEST_PRICE
        for _ in range(6):
            price = (cheap * dear) ** 0.5
            codes = attempt(mark, price)
            if len(codes) <= max_bytes:
                dear = price
                best = codes if len(codes) > len(best) else best
            else:
                cheap = price
        return best

    def _write(self, rotated_RC: Tensor, scales: Symbols, top: int, water_mark: int, price: float) -> bytes:
        scales = np.where(-LEVELS_PER_OCTAVE * scales - water_mark < MIN_LEVEL, SILENT, scales).astype(np.int32)
        parts: list[tuple[Symbols, Table]] = [(scales, self.tables.scale_table)]
        for level, indices in _Plan.of(scales, water_mark).rows_of_level.items():
            book = self.tables.codebooks[level]
            vectors_ND = torch.cat([self._vectors(rotated_RC, i, level, _scale(top - int(scales[i]))) for i in indices])
            chosen = book.search(vectors_ND, price * price_of_a_bit(level))
            parts.append((chosen.numpy().astype(np.int32), book.table))
        return _HEADER.pack(top, water_mark) + encode_symbols(parts)

    def _silence(self) -> bytes:
        """The codes of all-zero blocks."""
        scales = np.full(len(self._rows), SILENT, np.int32)
        return _HEADER.pack(0, 0) + encode_symbols([(scales, self.tables.scale_table)])

    def _exponents(self, rotated_RC: Tensor) -> list[int]:
        """Per row the rounded base-2 logarithm of its mean square."""
        energies = [float((rotated_RC[r.rank, r.start : r.stop] ** 2).mean()) for r in self._rows]
        floor, ceiling = 2.0**-_MAX_EXPONENT, 2.0**_MAX_EXPONENT
        return [round(float(np.log2(min(max(energy, floor), ceiling)))) for energy in energies]

    def _vectors(self, rotated_RC: Tensor, index: int, level: int, scale: float) -> Tensor:
        row = self._rows[index]
        length = band_of(level).length
        values = rotated_RC[row.rank, row.start : row.stop] / scale
        padding = self._num_vectors(index, level) * length - len(values)
        return torch.nn.functional.pad(values, (0, padding)).reshape(-1, length)

    def _num_vectors(self, index: int, level: int) -> int:
        row = self._rows[index]
        return -(-(row.stop - row.start) // band_of(level).length)

    def _axes(self, side: Tensor | None) -> Tensor:
        shape = (len(self.layout.blocks), self.layout.rank, self.layout.rank)
        if side is None:
            return torch.eye(self.layout.rank).expand(shape)
        if tuple(side.shape) != shape or not bool(torch.isfinite(side).all()):
            raise CodecError(
                f"side information of shape {tuple(side.shape)}: finite axes of shape {shape} are expected"
            )
        return side


def _scale(exponent: int) -> float:
    """Root of the energy ``2 ** exponent``."""
    return float(2.0 ** (exponent / 2))


def frozen_scale_table(counts: NDArray[np.float64]) -> Table:
    return integer_table(counts.astype(np.float64) + 0.5)
