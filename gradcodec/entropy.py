"""Entropy coding: symbols and integer frequency tables <-> bytes, by constriction's range coder.

Tables are integers that sum to ``TOTAL``, frozen in the codec artifact: as floats they are exact multiples of
``1 / TOTAL``, so both ends build the same model on every machine (Bamler 2022, "Understanding Entropy Coding With
Asymmetric Numeral Systems"). Knows integers; must not know tensors or what a symbol means.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

import constriction
import numpy as np
from numpy.typing import NDArray

from gradcodec.errors import CodecError

TOTAL = 1 << 16

Symbols = NDArray[np.int32]
Table = NDArray[np.uint16]


def integer_table(probabilities: NDArray[np.float64]) -> Table:
    """Probabilities -> integers of at least 1 that sum to ``TOTAL``; every symbol stays codable."""
    assert 1 < len(probabilities) <= TOTAL // 2
    shares = probabilities / probabilities.sum() * (TOTAL - len(probabilities))
    table = 1 + np.floor(shares).astype(np.int64)
    table[int(np.argmax(table))] += TOTAL - int(table.sum())
    frozen: Table = table.astype(np.uint16)
    return frozen


@cache
def uniform_table(bits: int) -> Table:
    """For integers below ``2 ** bits``, 1 to 15, all as likely."""
    return integer_table(np.ones(1 << bits))


def bits_of(table: Table) -> NDArray[np.float64]:
    """What each symbol costs, in bits."""
    bits: NDArray[np.float64] = -np.log2(table.astype(np.float64) / TOTAL)
    return bits


def encode_symbols(parts: Iterable[tuple[Symbols, Table]]) -> bytes:
    """Runs of symbols, each with its table -> bytes."""
    encoder = constriction.stream.queue.RangeEncoder()
    for symbols, table in parts:
        if len(symbols):
            encoder.encode(np.ascontiguousarray(symbols, dtype=np.int32), _model(table))
    words: bytes = encoder.get_compressed().astype("<u4").tobytes()
    return words.rstrip(b"\0")  # the reader puts the zeros back


class SymbolReader:
    """Bytes -> runs of symbols: the inverse of ``encode_symbols``, asked for in the same order.

    Whatever the bytes are, a read gives ``count`` symbols that the table knows, or raises ``CodecError``.
    """

    def __init__(self, data: bytes) -> None:
        padded = data + b"\0" * (-len(data) % 4)
        self._decoder = constriction.stream.queue.RangeDecoder(np.frombuffer(padded, "<u4").astype(np.uint32))

    def read(self, count: int, table: Table) -> Symbols:
        if count == 0:
            return np.empty(0, np.int32)
        try:
            return np.asarray(self._decoder.decode(_model(table), count), dtype=np.int32)
        except AssertionError as error:  # constriction's word for bytes that no encoder makes
            raise CodecError(f"entropy-coded symbols are damaged: {error}") from None


def gamma_parts(numbers: Symbols, lengths: Table) -> list[tuple[Symbols, Table]]:
    """Numbers of at least 1 as Elias gamma codes: the length with its own table, then the bits below the highest.

    Args:
        numbers: below ``2 ** len(lengths)``.
        lengths: table of the numbers' base-2 logarithms, rounded down.
    """
    octaves = np.frexp(numbers.astype(np.float64))[1].astype(np.int32) - 1
    rests = [(numbers[octaves == n] - np.int32(1 << n), uniform_table(n)) for n in range(1, len(lengths))]
    return [(octaves, lengths), *rests]


def read_gamma(reader: SymbolReader, count: int, lengths: Table) -> Symbols:
    """Inverse of ``gamma_parts``."""
    octaves = reader.read(count, lengths)
    numbers = np.ones(count, np.int32)
    for n in range(1, len(lengths)):
        chosen = octaves == n
        numbers[chosen] = (1 << n) + reader.read(int(chosen.sum()), uniform_table(n))
    return numbers


def _model(table: Table) -> constriction.stream.model.Categorical:
    return constriction.stream.model.Categorical(table.astype(np.float64) / TOTAL, perfect=False)
