"""Announcement: how strong the next sum is expected to be, which the server tells the clients.

Levels, energies in steps of 1.5 dB, as integers: they decide what is sent and in which steps, so both ends must have
the same to the bit, which floats of two machines are not. Knows numbers; must not know layouts.

    size                      field
    one a row and one a band  int8 each, deflated together
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gradcodec.errors import CodecError
from gradcodec.learned.spectrum import LEVELS_PER_OCTAVE

Bytes = NDArray[np.int8]
Doubles = NDArray[np.float64]

LOWEST, HIGHEST = -128, 127
"""Energies of 2**-64 to 2**63.5: what an announcement says is finite and positive, whatever its bytes."""


@dataclass(frozen=True)
class Announcement:
    """Levels int8: what is added to the expected level of every row of every block ``[N]``, and that of the
    coordinates of every band ``[B]`` of the sum over all clients."""

    rows_N: Bytes
    bands_B: Bytes

    def pack(self) -> bytes:
        """At most about a byte a level; about half of it in practice, since levels of neighbours are alike."""
        return zlib.compress(self.rows_N.tobytes() + self.bands_B.tobytes(), 9)

    @classmethod
    def unpack(cls, data: bytes, num_rows: int, num_bands: int) -> Announcement:
        """Inverse of ``pack``. Raises CodecError: these are no bytes of such an announcement."""
        expected = num_rows + num_bands
        unpacker = zlib.decompressobj()
        try:
            levels = unpacker.decompress(data, expected + 1)
        except zlib.error as error:
            raise CodecError(f"an announcement cannot be read: {error}") from None
        if len(levels) != expected or not unpacker.eof or unpacker.unused_data:
            raise CodecError(
                f"an announcement of {len(levels)} levels: {num_rows} rows and {num_bands} bands are expected; both "
                "ends need the same model, rank and target modules"
            )
        values = np.frombuffer(levels, np.int8)
        return cls(values[:num_rows].copy(), values[num_rows:].copy())


def levels_of(energies: Doubles) -> Bytes:
    """Energies, at least 0 -> the nearest levels that there are."""
    levels = np.rint(LEVELS_PER_OCTAVE * np.log2(np.maximum(energies, 2.0**-64)))
    return np.clip(levels, LOWEST, HIGHEST).astype(np.int8)


def energies_of(levels: NDArray[np.integer]) -> Doubles:
    """Inverse of ``levels_of``."""
    return np.exp2(levels / LEVELS_PER_OCTAVE)
