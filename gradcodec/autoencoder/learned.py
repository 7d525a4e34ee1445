"""The learned codec: rotation, scales, vectors found by search, everything entropy-coded.

    blocks -> rotate along rank and width (transform.py)
           -> one scale a row, in steps of 3 dB
           -> reverse water-filling: a piece's level = its energy over the allowed distortion (the water mark);
              pieces below the lowest level are silent
           -> codewords by search (codebooks.py) -> range coder (entropy.py)

One artifact serves every budget and every geometry: only the water mark changes. Departures from the paper: its
ResNet over a picture of all factors carries no client information (``docs/negative-results.md``).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

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
from gradcodec.autoencoder.transform import MAX_OFFSET, Piece, Transform, WidthBasis
from gradcodec.codec import codec_id
from gradcodec.entropy import SymbolReader, Symbols, Table, bits_of, encode_symbols, integer_table
from gradcodec.errors import BudgetError, CodecError
from gradcodec.frame import Codes
from gradcodec.gauge import principal_axes
from gradcodec.layout import Layout

SILENT = 31
"""Scale symbol of a row that is not sent; 0 to 30 are steps of 3 dB below the strongest row."""
_HEADER = struct.Struct("<hh")  # exponent of the strongest row's energy, water mark in levels
_MAX_EXPONENT = 120
_COARSEST_PRICE = 16.0
_LOWEST_MARK = -MAX_LEVEL
_HIGHEST_MARK = -MIN_LEVEL + MAX_OFFSET + 1
_BASIS, _OFFSETS = "basis.", "offsets."


@dataclass(frozen=True)
class LearnedTables:
    """All that the codec learned: a codebook a level, and how often each scale symbol occurs."""

    codebooks: Mapping[int, Codebook]
    scale_table: Table
    bases: Mapping[str, WidthBasis] = field(default_factory=dict)

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
        return cls(codebooks, _table(tensors, "frequencies.scale", SILENT + 1), _bases(tensors))

    def to_tensors(self) -> dict[str, Tensor]:
        """Inverse of ``from_tensors``."""
        tensors = {"frequencies.scale": torch.from_numpy(self.scale_table.astype(np.int32))}
        for level, book in self.codebooks.items():
            tensors[f"codewords.{level}"] = book.codewords_KD.contiguous()
            tensors[f"frequencies.{level}"] = torch.from_numpy(book.table.astype(np.int32))
        for name, basis in self.bases.items():
            tensors[_BASIS + name] = basis.basis_WW.half()
            tensors[_OFFSETS + name] = torch.tensor(basis.offsets, dtype=torch.int32)
        return tensors


def _bases(tensors: Mapping[str, Tensor]) -> dict[str, WidthBasis]:
    bases: dict[str, WidthBasis] = {}
    for key in tensors:
        if key.startswith(_BASIS):
            name = key.removeprefix(_BASIS)
            basis_WW, offsets = _checked(tensors, key, 2).float(), _checked(tensors, _OFFSETS + name, 1).tolist()
            if basis_WW.shape[0] != basis_WW.shape[1] or not 0 < len(offsets) <= len(basis_WW):
                raise CodecError(f"artifact tensor {key!r} of shape {tuple(basis_WW.shape)} is no basis of segments")
            if max(map(abs, offsets)) > MAX_OFFSET or not bool(torch.isfinite(basis_WW).all()):
                raise CodecError(f"artifact tensor {_OFFSETS + name!r} or its basis is out of range")
            bases[name] = WidthBasis(basis_WW, tuple(offsets))
    return bases


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


class LearnedCodec:
    """``learned``: see the module. Serves budgets down to the scales' cost, a few bits a row."""

    num_streams = 1

    def __init__(self, layout: Layout, tables: LearnedTables, weights_digest: bytes) -> None:
        self.layout = layout
        self.tables = tables
        self.id = codec_id("learned/1", weights_digest)
        self._transform = Transform(layout, tables.bases)

    @classmethod
    def from_artifact(cls, artifact: Artifact, layout: Layout) -> LearnedCodec:
        """Serves any layout. Raises CodecError: the artifact's tensors are not this codec's."""
        return cls(layout, LearnedTables.from_tensors(artifact.tensors), bytes.fromhex(artifact.digest))

    def side_information(self, global_update_RC: Tensor) -> Tensor | None:
        """Principal axes of the last global update, ``[B, R, R]`` float32."""
        return principal_axes(global_update_RC, self.layout)

    def encode(self, blocks_RC: Tensor, max_bytes: int | None, side: Tensor | None) -> Codes:
        coefficients_RC = self._transform.analyse(blocks_RC, side)
        exponents = self._transform.row_exponents(coefficients_RC)
        top = max(exponents, default=-_MAX_EXPONENT)
        symbols = [min(top - exponent, SILENT) for exponent in exponents]
        if max_bytes is not None and max_bytes < len(silence := self._silence()):
            raise BudgetError(f"{max_bytes} bytes for the codes; the learned codec needs at least {len(silence)}")

        def attempt(water_mark: int, price: float) -> bytes:
            return self._write(coefficients_RC, np.array(symbols, np.int32), top, water_mark, price)

        if top <= -_MAX_EXPONENT:
            return (self._silence(),)
        if max_bytes is None:
            return (attempt(_LOWEST_MARK, 1.0),)
        return (self._fill(attempt, max_bytes),)

    def decode(self, codes: Codes, side: Tensor | None) -> Tensor:
        if len(codes[0]) < _HEADER.size:
            raise CodecError(f"{len(codes[0])} bytes of codes: the header alone takes {_HEADER.size}")
        top, water_mark = _HEADER.unpack_from(codes[0])
        if abs(top) > _MAX_EXPONENT or not _LOWEST_MARK <= water_mark <= _HIGHEST_MARK:
            raise CodecError(f"scale exponent {top} or water mark {water_mark} out of range")
        reader = SymbolReader(codes[0][_HEADER.size :])
        scales = reader.read(len(self._transform.rows), self.tables.scale_table)
        coefficients_RC = torch.zeros(self.layout.rank, self.layout.num_columns)
        for level, pieces in self._pieces_of_levels(scales, water_mark).items():
            book = self.tables.codebooks[level]
            counts = [_num_vectors(piece, level) for piece in pieces]
            chosen = torch.from_numpy(reader.read(sum(counts), book.table).astype(np.int64))
            for piece, vectors_ND in zip(pieces, book.codewords_KD[chosen].split(counts), strict=True):
                values = vectors_ND.flatten()[: piece.stop - piece.start] * piece_scale(
                    top - int(scales[piece.row]), piece
                )
                coefficients_RC[piece.rank, piece.start : piece.stop] = values
        return self._transform.synthesise(coefficients_RC, side)

    def _fill(self, attempt: Callable[[int, float], bytes], max_bytes: int) -> bytes:
        """The best codes that fit: the lowest water mark, then the lowest price of a bit at that mark."""
        low, high = _LOWEST_MARK, _HIGHEST_MARK  # the highest leaves every row silent: it always fits
        best = self._silence()
        while low < high:
            middle = (low + high) // 2
            codes = attempt(middle, 1.0)
            if len(codes) <= max_bytes:
                high, best = middle, codes
            else:
                low = middle + 1
        mark = max(high - 1, _LOWEST_MARK)
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

    def _write(self, coefficients_RC: Tensor, scales: Symbols, top: int, water_mark: int, price: float) -> bytes:
        highest = -LEVELS_PER_OCTAVE * scales + np.array(self._transform.largest_offset) - water_mark
        scales = np.where(highest < MIN_LEVEL, SILENT, scales).astype(np.int32)
        parts: list[tuple[Symbols, Table]] = [(scales, self.tables.scale_table)]
        for level, pieces in self._pieces_of_levels(scales, water_mark).items():
            book = self.tables.codebooks[level]
            vectors = [_vectors(coefficients_RC, p, level, piece_scale(top - int(scales[p.row]), p)) for p in pieces]
            chosen = book.search(torch.cat(vectors), price * price_of_a_bit(level))
            parts.append((chosen.numpy().astype(np.int32), book.table))
        return _HEADER.pack(top, water_mark) + encode_symbols(parts)

    def _pieces_of_levels(self, scales: Symbols, water_mark: int) -> dict[int, list[Piece]]:
        """Both ends derive from scale symbols and water mark which piece has which level; lowest level first."""
        found: dict[int, list[Piece]] = {}
        symbols = scales.tolist()
        for piece in self._transform.pieces:
            level = -LEVELS_PER_OCTAVE * symbols[piece.row] + piece.offset - water_mark
            if symbols[piece.row] != SILENT and level >= MIN_LEVEL:
                found.setdefault(min(level, MAX_LEVEL), []).append(piece)
        return dict(sorted(found.items()))

    def _silence(self) -> bytes:
        """The codes of all-zero blocks."""
        scales = np.full(len(self._transform.rows), SILENT, np.int32)
        return _HEADER.pack(0, 0) + encode_symbols([(scales, self.tables.scale_table)])


def _vectors(coefficients_RC: Tensor, piece: Piece, level: int, scale: float) -> Tensor:
    length = band_of(level).length
    values = coefficients_RC[piece.rank, piece.start : piece.stop] / scale
    padding = _num_vectors(piece, level) * length - len(values)
    return torch.nn.functional.pad(values, (0, padding)).reshape(-1, length)


def _num_vectors(piece: Piece, level: int) -> int:
    return -(-(piece.stop - piece.start) // band_of(level).length)


def piece_scale(exponent: int, piece: Piece) -> float:
    """Root of the energy of a piece whose row has energy ``2 ** exponent``."""
    return float(2.0 ** (exponent / 2 + piece.offset / (2 * LEVELS_PER_OCTAVE)))


def frozen_scale_table(counts: NDArray[np.float64]) -> Table:
    return integer_table(counts.astype(np.float64) + 0.5)
