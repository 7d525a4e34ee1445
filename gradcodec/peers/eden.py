"""``eden``: a random rotation, then a scalar quantiser for Gaussians.

Vargaftik et al. 2021, "DRIVE: One-bit Distributed Mean Estimation"; 2022, "EDEN: Communication-Efficient and Robust
Distributed Mean Estimation". A randomised Hadamard transform makes the coordinates of any vector nearly Gaussian and
equal in energy. Each is sent in a few bits (Lloyd-Max centroids); below one bit, only a random part of them is.

    offset  size  field
    0       4     seed of the rotation, from the values themselves: new coordinates are left out in every round, so
                  that error feedback reaches all of them
    4       4     scale of the coordinates that have ``width + 1`` bits (float32)
    8       4     scale of those that have ``width`` bits (float32)
    12      -     indices of the first, then of the second; both counts follow from the number of bytes

Departures: the scale is the biased one of least squared error (EDEN's unbiased one for the mean of many clients is
not contractive: with error feedback its noise would add up); a length that is no power of two is not padded but
rotated in two overlapping pieces; a rate between two whole widths gives some coordinates a bit more than the others.
"""

from __future__ import annotations

import math
import struct
import zlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gradcodec.codec import WithoutSideInformation, codec_id
from gradcodec.errors import BudgetError, CodecError
from gradcodec.frame import Codes
from gradcodec.layout import Layout
from gradcodec.peers.packing import (
    MAX_WIDTH,
    Floats,
    budget_of,
    finite,
    gaussian_codebook,
    least_squares_scale,
    nearest,
    pack_indices,
    packed_bytes,
    unpack_indices,
)

_HEADER = struct.Struct("<Iff")


@dataclass(frozen=True)
class EdenCodec(WithoutSideInformation):
    """``eden``: any rate up to 8 bits."""

    layout: Layout
    id: bytes = codec_id("eden/1")
    num_streams: int = 1

    def encode(self, blocks_RC: Tensor, max_bytes: int | None, side: Tensor | None) -> Codes:
        count = self.layout.num_parameters
        if max_bytes is None:
            max_bytes = budget_of(None, count) + _HEADER.size
        if max_bytes <= _HEADER.size:
            raise BudgetError(f"{max_bytes} bytes for the codes; eden needs more than {_HEADER.size}")
        values = self.layout.flatten(blocks_RC).cpu().contiguous()
        seed = zlib.crc32(values.numpy().tobytes())
        rotated = rotate_randomly(values, seed).numpy()
        num_bytes = min(max_bytes - _HEADER.size, packed_bytes(count, MAX_WIDTH))
        width, num_wider = _shares(num_bytes, count)
        wider, scale = _quantise(rotated[:num_wider], width + 1)
        rest, rest_scale = _quantise(rotated[num_wider:], width)
        return (_HEADER.pack(seed, scale, rest_scale) + (wider + rest).ljust(num_bytes, b"\0"),)

    def decode(self, codes: Codes, side: Tensor | None) -> Tensor:
        count = self.layout.num_parameters
        num_bytes = len(codes[0]) - _HEADER.size
        if not 0 < num_bytes <= packed_bytes(count, MAX_WIDTH):
            raise CodecError(f"{len(codes[0])} bytes of codes for {count} parameters")
        seed, scale, rest_scale = _HEADER.unpack_from(codes[0])
        width, num_wider = _shares(num_bytes, count)
        middle = _HEADER.size + packed_bytes(num_wider, width + 1)
        stop = middle + packed_bytes(count - num_wider, width)
        wider = _restore(codes[0][_HEADER.size : middle], width + 1, num_wider, scale)
        rest = _restore(codes[0][middle:stop], width, count - num_wider, rest_scale)
        values = unrotate_randomly(torch.from_numpy(finite(np.concatenate([wider, rest]))), seed)
        finite(values.numpy())
        return self.layout.unflatten(values)


def _shares(num_bytes: int, count: int) -> tuple[int, int]:
    """Bytes -> ``width`` and how many of ``count`` coordinates have ``width + 1`` bits; those left have ``width``.

    Where both parts have bits, one byte is set aside: each part is rounded up to whole bytes.
    """
    width = min(8 * num_bytes // count, MAX_WIDTH)
    if width == MAX_WIDTH:
        return width, 0
    spare = 8 * num_bytes if width == 0 else 8 * (num_bytes - 1) - count * width
    return width, min(max(spare, 0), count)


def _quantise(values: Floats, width: int) -> tuple[bytes, float]:
    if width == 0 or len(values) == 0:
        return b"", 0.0
    rms = float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))
    book = gaussian_codebook(width)
    indices = nearest(values / np.float32(rms) if rms > 0 else values, book)
    return pack_indices(indices, width), least_squares_scale(values, book[indices])


def _restore(data: bytes, width: int, count: int, scale: float) -> Floats:
    if width == 0 or count == 0:
        return np.zeros(count, np.float32)
    with np.errstate(over="ignore"):  # refused where the blocks are checked
        return gaussian_codebook(width)[unpack_indices(data, width, count)] * np.float32(scale)


def rotate_randomly(values: Tensor, seed: int) -> Tensor:
    """Random signs, a Hadamard transform of the first ``2 ** k`` values, then of the last ``2 ** k``; twice.

    The result is reordered so that its first so many coordinates come from everywhere.
    """
    values = values.clone()
    for piece, signs in _passes(len(values), seed):
        values[piece] = hadamard(values[piece] * signs)
    return values[_order(len(values), seed)]


def unrotate_randomly(values: Tensor, seed: int) -> Tensor:
    """Inverse of ``rotate_randomly``."""
    turned = torch.empty_like(values)
    turned[_order(len(values), seed)] = values
    for piece, signs in reversed(_passes(len(turned), seed)):
        turned[piece] = hadamard(turned[piece]) * signs
    return turned


def _passes(count: int, seed: int) -> list[tuple[slice, Tensor]]:
    size = 1 << (count.bit_length() - 1)
    pieces = [slice(0, size)] if size == count else [slice(0, size), slice(count - size, count)] * 2
    raw = np.random.PCG64(seed).random_raw(len(pieces) * (size // 64 + 1)).astype("<u8").view(np.uint8)
    bits = np.unpackbits(raw.reshape(len(pieces), -1), axis=1, count=size)
    return [(piece, torch.from_numpy(1 - 2 * row.astype(np.float32))) for piece, row in zip(pieces, bits, strict=True)]


def _order(count: int, seed: int) -> Tensor:
    """Strides of about the golden section of the length, from a random start: a cheap permutation."""
    stride = next(s for s in range(round(0.618 * count), 2 * count + 2) if math.gcd(s, count) == 1)
    return (torch.arange(count) * stride + seed) % count


def hadamard(values: Tensor) -> Tensor:
    """Orthonormal Walsh-Hadamard transform of ``2 ** k`` values, its own inverse."""
    size, step = len(values), 1
    while step < size:
        pairs = values.reshape(-1, 2, step)
        values = torch.stack([pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]], dim=1).reshape(-1)
        step *= 2
    scaled: Tensor = values / size**0.5
    return scaled
