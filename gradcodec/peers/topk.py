"""``topk``: the largest values, their positions entropy-coded, their magnitudes in a few bits.

Sparsification with error feedback (Stich et al. 2018, "Sparsified SGD with Memory"; for LoRA: FLASC, EcoLoRA, FedSRD,
SparseLoCo), tuned as far as it goes: positions cost the binary entropy of each tensor's own share of sent values,
magnitudes are 1-D k-means centroids, and of 0, 1, 2 or 3 bits a magnitude the one of least error is taken. The number
of values is the largest that fits.

    offset  size      field
    0       1         bits a magnitude, 0 to 3
    1       2 << b    centroids, descending (upper halves of float32)
    ..      -         range-coded: tensors' classes, positions, magnitudes, signs
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradcodec.codec import WithoutSideInformation, codec_id
from gradcodec.entropy import SymbolReader, Symbols, Table, bits_of, encode_symbols, integer_table, uniform_table
from gradcodec.errors import BudgetError, CodecError
from gradcodec.frame import Codes
from gradcodec.layout import Layout
from gradcodec.peers.packing import Floats, budget_of, finite

MAX_MAGNITUDE_BITS = 3
NUM_CLASSES = 32
"""A tensor of class q sends about one value in ``2 ** (q / 2)``; the last class sends none."""
_SLACK_BYTES = 3
_KMEANS_STEPS = 30

Doubles = NDArray[np.float64]


def _position_tables() -> list[Table]:
    """Per class how often a value is not sent, and sent. Integers from integers alone: equal on every machine."""
    doubled = [2 ** (16 - q // 2) if q % 2 == 0 else 46341 >> (q // 2) for q in range(NUM_CLASSES)]
    shares = [min(max(share, 1), 65000) for share in doubled]
    return [integer_table(np.array([(1 << 16) - share, share], np.float64)) for share in shares]


_POSITIONS = _position_tables()
_POSITION_BITS = np.stack([bits_of(table) for table in _POSITIONS])
_FIRST_CLASS = integer_table(np.ones(NUM_CLASSES))
_NEXT_CLASS = integer_table(np.array([2.0 ** -min(abs(step), 12) for step in range(-NUM_CLASSES + 1, NUM_CLASSES)]))


@dataclass(frozen=True)
class TopkCodec(WithoutSideInformation):
    """``topk``: any rate up to what sends all values, about 5 bits."""

    layout: Layout
    id: bytes = codec_id("topk/1")
    num_streams: int = 1

    def encode(self, blocks_RC: Tensor, max_bytes: int | None, side: Tensor | None) -> Codes:
        max_bytes = budget_of(max_bytes, self.layout.num_parameters)
        values: Floats = self.layout.flatten(blocks_RC).cpu().numpy()
        if len(silence := self._write(values, np.empty(0, np.int64), np.zeros(1, np.float32))) > max_bytes:
            raise BudgetError(f"{max_bytes} bytes for the codes; topk needs at least {len(silence)}")
        ranking = _Ranking(values, self.layout)
        best, least = silence, np.inf
        for bits in range(MAX_MAGNITUDE_BITS + 1):
            count = ranking.largest_count(8 * (max_bytes - _SLACK_BYTES), bits)
            while count > 0:
                centroids, error = ranking.centroids(count, 1 << bits)
                if error >= least:
                    break
                codes = self._write(values, ranking.order[:count], centroids)
                if len(codes) <= max_bytes:
                    best, least = codes, error
                    break
                count = min(count - 1, count * max_bytes // (len(codes) + 1))
        return (best,)

    def decode(self, codes: Codes, side: Tensor | None) -> Tensor:
        bits = codes[0][0] if codes[0] else MAX_MAGNITUDE_BITS + 1
        start = 1 + (2 << bits) if bits <= MAX_MAGNITUDE_BITS else 0
        if not 0 < start <= len(codes[0]):
            raise CodecError(f"{len(codes[0])} bytes of codes hold no centroids")
        centroids = finite(_from_halves(codes[0][1:start]))
        reader = SymbolReader(codes[0][start:])
        classes = _read_classes(reader, len(self.layout.blocks))
        sent = [
            reader.read(block.size, _POSITIONS[q]) if q < NUM_CLASSES - 1 else np.zeros(block.size, np.int32)
            for q, block in zip(classes, self.layout.blocks, strict=True)
        ]
        positions = np.flatnonzero(np.concatenate(sent))
        magnitudes = reader.read(len(positions), uniform_table(bits)) if bits else np.zeros(len(positions), np.int32)
        signs = reader.read(len(positions), uniform_table(1))
        values = np.zeros(self.layout.num_parameters, np.float32)
        values[positions] = centroids[magnitudes] * (1 - 2 * signs)
        return self.layout.unflatten(torch.from_numpy(values))

    def _write(self, values: Floats, positions: NDArray[np.int64], centroids: Floats) -> bytes:
        bits = len(centroids).bit_length() - 1
        is_sent = np.zeros(len(values), np.int32)
        is_sent[positions] = 1
        sizes = np.array([block.size for block in self.layout.blocks])
        pieces = np.split(is_sent, np.cumsum(sizes)[:-1])
        classes = _classes(np.array([int(piece.sum()) for piece in pieces]), sizes)[0]
        chosen = values[np.flatnonzero(is_sent)]
        edges = (centroids[1:] + centroids[:-1]) / 2
        magnitudes = (np.searchsorted(-edges, -np.abs(chosen))).astype(np.int32)
        parts = _class_parts(classes)
        parts += [(p, _POSITIONS[q]) for p, q in zip(pieces, classes.tolist(), strict=True) if q < NUM_CLASSES - 1]
        if bits:
            parts.append((magnitudes, uniform_table(bits)))
        parts.append(((chosen < 0).astype(np.int32), uniform_table(1)))
        return bytes([bits]) + _to_halves(centroids) + encode_symbols(parts)


class _Ranking:
    """Values in order of magnitude, with prefix sums: what any number of them would cost and leave out."""

    def __init__(self, values: Floats, layout: Layout) -> None:
        self._magnitudes, order = torch.from_numpy(values).abs().sort(descending=True, stable=True)
        self.order: NDArray[np.int64] = order.numpy()
        self._sums = np.concatenate([[0.0], np.cumsum(self._magnitudes.numpy(), dtype=np.float64)])
        self._sizes = np.array([block.size for block in layout.blocks])
        self._owners = np.repeat(np.arange(len(self._sizes), dtype=np.int32), self._sizes)[self.order]
        self._num_nonzero = int(np.count_nonzero(values))

    def largest_count(self, max_bits: float, magnitude_bits: int) -> int:
        """The largest number of values that fits, by the tables' exact prices."""
        low, high = 0, self._num_nonzero
        max_bits -= 8 * (1 + (2 << magnitude_bits))
        while low < high:
            middle = (low + high + 1) // 2
            too_dear = middle * (1 + magnitude_bits) > max_bits or self._bits(middle, magnitude_bits) > max_bits
            low, high = (low, middle - 1) if too_dear else (middle, high)
        return low

    def _bits(self, count: int, magnitude_bits: int) -> float:
        counts = np.bincount(self._owners[:count], minlength=len(self._sizes))
        return _classes(counts, self._sizes)[1] + count * (1 + magnitude_bits)

    def centroids(self, count: int, num_centroids: int) -> tuple[Floats, float]:
        """1-D k-means of the ``count`` largest magnitudes, descending; the squared error less the values' energy."""
        ends = np.linspace(0, count, num_centroids + 1).astype(np.int64)
        largest = self._magnitudes[:count].numpy()
        for _ in range(_KMEANS_STEPS):
            means = (self._sums[ends[1:]] - self._sums[ends[:-1]]) / np.maximum(np.diff(ends), 1)
            inner = np.searchsorted(-largest, -(means[1:] + means[:-1]) / 2)
            ends = np.concatenate([[0], np.maximum.accumulate(inner), [count]])
        rounded = _from_halves(_to_halves(means.astype(np.float32)))
        sums, sizes = np.diff(self._sums[ends]), np.diff(ends)
        return rounded, float((sizes * rounded.astype(np.float64) ** 2 - 2 * sums * rounded).sum())


def _classes(counts: NDArray[np.int64], sizes: NDArray[np.int64]) -> tuple[Symbols, float]:
    """Per tensor the class whose table is cheapest for so many sent values; bits of all positions and classes."""
    sent, size = counts[:, None], sizes[:, None]
    prices = (size - sent) * _POSITION_BITS[:, 0] + sent * _POSITION_BITS[:, 1]
    prices[:, -1] = np.where(counts > 0, np.inf, 0.0)
    classes = np.argmin(prices, axis=1).astype(np.int32)
    own = sum(float(bits_of(table)[symbols].sum()) for symbols, table in _class_parts(classes))
    return classes, float(prices[np.arange(len(classes)), classes].sum()) + own


def _class_parts(classes: Symbols) -> list[tuple[Symbols, Table]]:
    return [(classes[:1], _FIRST_CLASS), (np.diff(classes) + np.int32(NUM_CLASSES - 1), _NEXT_CLASS)]


def _read_classes(reader: SymbolReader, count: int) -> list[int]:
    first = reader.read(1, _FIRST_CLASS)
    steps = reader.read(count - 1, _NEXT_CLASS) - (NUM_CLASSES - 1)
    classes = np.cumsum(np.concatenate([first, steps]))
    if classes.min() < 0 or classes.max() >= NUM_CLASSES:
        raise CodecError("a tensor's share of sent values is out of range")
    found: list[int] = classes.tolist()
    return found


def _to_halves(values: Floats) -> bytes:
    return (np.ascontiguousarray(values, "<f4").view("<u4") >> 16).astype("<u2").tobytes()


def _from_halves(data: bytes) -> Floats:
    return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
