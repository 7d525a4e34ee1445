"""What the peers share: narrow integers <-> bytes, Gaussian codebooks, the rate that a peer has of its own.

Knows numbers; must not know layouts.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradcodec.errors import CodecError
from gradcodec.exchange import max_payload_bytes

OWN_BITS = 1.0
"""Bits per parameter of a codec that has a rate and was given no budget."""
MAX_WIDTH = 8

Floats = NDArray[np.float32]
Indices = NDArray[np.uint8]


def budget_of(max_bytes: int | None, num_parameters: int) -> int:
    """Bytes that the codes may take; the peers' own rate if none are given."""
    return max(1, max_payload_bytes(OWN_BITS, num_parameters)) if max_bytes is None else max_bytes


def pack_indices(indices: Indices, width: int) -> bytes:
    """Integers below ``2 ** width`` -> ``ceil(len * width / 8)`` bytes, highest bit first; width 0 to 8."""
    if width == MAX_WIDTH:
        return indices.tobytes()
    bits = np.unpackbits(indices[:, None], axis=1)[:, MAX_WIDTH - width :]
    return np.packbits(bits).tobytes()


def unpack_indices(data: bytes, width: int, count: int) -> Indices:
    """Inverse of ``pack_indices``. Raises CodecError: another number of bytes."""
    if len(data) != packed_bytes(count, width):
        raise CodecError(f"{len(data)} bytes where {count} integers of {width} bits are expected")
    if width == MAX_WIDTH:
        return np.frombuffer(data, np.uint8)
    bits = np.zeros((count, MAX_WIDTH), np.uint8)
    bits[:, MAX_WIDTH - width :] = np.unpackbits(np.frombuffer(data, np.uint8), count=count * width).reshape(-1, width)
    return np.packbits(bits, axis=1).reshape(-1)


def packed_bytes(count: int, width: int) -> int:
    """Size of what ``pack_indices`` gives of ``count`` integers."""
    return -(-count * width // 8)


@cache
def gaussian_codebook(width: int) -> Floats:
    """The ``2 ** width`` centroids of least squared error for a standard normal, ascending (Lloyd 1982, Max 1960)."""
    centroids = np.linspace(-1, 1, 1 << width) * min(width, 4) if width > 1 else np.array([-1.0, 1.0])
    for _ in range(min(200 << width, 4000)):
        edges = np.concatenate([[-np.inf], (centroids[1:] + centroids[:-1]) / 2, [np.inf]])
        density = np.exp(-edges * edges / 2) / math.sqrt(2 * math.pi)
        below = np.array([0.5 * (1 + math.erf(edge / math.sqrt(2))) for edge in edges])
        centroids = (density[:-1] - density[1:]) / (below[1:] - below[:-1])
    return np.asarray(centroids, np.float32)


def nearest(values: Floats, codebook: Floats) -> Indices:
    """Index of the nearest entry of an ascending codebook of at most 256 entries."""
    edges = (codebook[1:] + codebook[:-1]) / 2
    return np.searchsorted(edges, values).astype(np.uint8)


def least_squares_scale(values: Floats, quantised: Floats) -> float:
    """The float32 factor that brings ``quantised`` nearest to ``values``: of all scales, the biased one of least
    squared error. It makes the code contractive, which error feedback needs; the unbiased one is not."""
    energy = float(quantised.astype(np.float64) @ quantised)
    return float(np.float32(values.astype(np.float64) @ quantised / energy)) if energy > 0 else 0.0


def finite(values: NDArray[Any]) -> Floats:
    """Raises CodecError: NaN or infinity."""
    if not np.isfinite(values).all():
        raise CodecError("the codes hold NaN, infinity or a scale out of range")
    return values
