"""Announcement: how strong the next sum is expected to be, which the server tells the clients.

Levels, energies in steps of 1.5 dB, as integers: they decide what is sent and in which steps, so both ends must have
the same to the bit, which floats of two machines are not. Knows numbers; must not know layouts.

    rows, classes of columns and bands: int8 each, deflated together
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gradcodec.errors import CodecError
from gradcodec.learned.spectrum import LEVELS_PER_OCTAVE

Levels = NDArray[np.int8]
Doubles = NDArray[np.float64]

LOWEST, HIGHEST = -128, 127
"""Energies of 2**-64 to 2**63.5: what an announcement says is finite and positive, whatever its bytes."""


@dataclass(frozen=True)
class Announcement:
    """Levels int8: what is added to the tables' level of every row of every block ``[N]`` and of every class of columns
    ``[G]``, and that of the coordinates of every band ``[B]`` of the sum over all clients."""

    rows_N: Levels
    columns_G: Levels
    bands_B: Levels

    def pack(self) -> bytes:
        """At most about a byte a level; half of it in practice, since neighbours are alike."""
        return zlib.compress(b"".join(part.tobytes() for part in (self.rows_N, self.columns_G, self.bands_B)), 9)

    @classmethod
    def unpack(cls, data: bytes, num_rows: int, num_classes: int, num_bands: int) -> Announcement:
        """Inverse of ``pack``. Raises CodecError: these are no bytes of such an announcement."""
        expected = num_rows + num_classes + num_bands
        unpacker = zlib.decompressobj()
        try:
            levels = unpacker.decompress(data, expected + 1)
        except zlib.error as error:
            raise CodecError(f"an announcement cannot be read: {error}") from None
        if len(levels) != expected or not unpacker.eof or unpacker.unused_data:
            raise CodecError(
                f"an announcement of {len(levels)} levels: {expected} are expected; both ends need the same model, "
                "rank and target modules"
            )
        rows_N, columns_G, bands_B = np.split(np.frombuffer(levels, np.int8), [num_rows, num_rows + num_classes])
        return cls(rows_N, columns_G, bands_B)


def levels_of(energies: Doubles) -> Levels:
    """Energies, at least 0 -> the nearest levels that there are."""
    exact = LEVELS_PER_OCTAVE * np.log2(np.maximum(energies, 2.0**-64))
    levels: Levels = np.clip(np.rint(exact), LOWEST, HIGHEST).astype(np.int8)
    return levels


def energies_of(levels: NDArray[np.signedinteger]) -> Doubles:
    """Inverse of ``levels_of``, for integers of any width."""
    energies: Doubles = np.exp2(levels / LEVELS_PER_OCTAVE)
    return energies
