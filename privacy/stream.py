"""A stream of random bits that nobody foresees: the keystream of ChaCha20 (RFC 8439), as words, uniforms and integers.
Knows numpy and no use of it: masks (privacy.secagg), normals and discrete noise draw from here.

Whoever has the 32 bytes of a seed has all of the stream, so a seed is drawn from the operating system
(``Stream.fresh()``) unless two parties must agree on it, or a test on its numbers. ``numpy.random`` is no stand-in: its
generators are foretold from their output, and its seeds are short.

The same seed gives the same bits on every machine: words are little-endian and are used in order, however many are
asked for at once.
"""

from __future__ import annotations

import os
import sys

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from numpy.typing import NDArray

SEED_BYTES = 32
MAX_MODULUS = 1 << 32
MAX_BYTES = 1 << 38  # 2^32 blocks of 64 bytes: where a 32-bit block counter would begin anew


class Stream:
    """Random bits, used up as they are drawn; one user at a time.

    Args:
        seed: 32 bytes, secret and used for nothing else.

    Raises:
        ValueError: a seed of another length.
    """

    def __init__(self, seed: bytes) -> None:
        if len(seed) != SEED_BYTES:
            raise ValueError(f"a stream's seed has {SEED_BYTES} bytes, not {len(seed)}")
        self._cipher = Cipher(ChaCha20(seed, bytes(16)), mode=None).encryptor()
        self._left = MAX_BYTES

    @classmethod
    def fresh(cls) -> Stream:
        """One that nobody can repeat, seeded by the operating system."""
        return cls(os.urandom(SEED_BYTES))

    def bytes(self, count: int) -> bytes:
        """The next ``count`` bytes."""
        self._left -= count
        assert self._left >= 0, "256 GiB of one seed: draw a new one"
        return self._cipher.update(bytes(count))

    def words(self, count: int, dtype: type[np.unsignedinteger] = np.uint64) -> NDArray[np.unsignedinteger]:
        """The next ``count`` words, uniform over all values of an unsigned ``dtype``."""
        raw = np.frombuffer(self.bytes(count * np.dtype(dtype).itemsize), dtype=dtype)
        return raw if sys.byteorder == "little" else raw.byteswap()

    def uniforms(self, count: int) -> NDArray[np.float64]:
        """``count`` numbers from (0, 1], multiples of 2^-53 that are all as likely. Never 0, so their logarithm is
        finite."""
        return ((self.words(count) >> np.uint64(11)).astype(np.float64) + 1.0) * 2.0**-53

    def integers(self, count: int, modulus: int) -> NDArray[np.uint32]:
        """``count`` integers from 0 to ``modulus`` - 1, uniform without bias: 32-bit words beyond the largest multiple
        of the modulus are passed over. So the result is a function of the words in order, the same for whoever holds
        the seed.

        Args:
            count: how many.
            modulus: 1 to 2^32.

        Raises:
            ValueError: a modulus out of this range.
        """
        if not 1 <= modulus <= MAX_MODULUS:
            raise ValueError(f"modulus {modulus}: integers are drawn below 1 to 2^32")
        if MAX_MODULUS % modulus == 0:
            return self.words(count, np.uint32) & np.uint32(modulus - 1)
        limit = np.uint32(MAX_MODULUS - MAX_MODULUS % modulus)
        found = np.empty(count, dtype=np.uint32)
        done = 0
        while done < count:
            words = self.words(count - done, np.uint32)
            kept = words[words < limit]
            found[done : done + len(kept)] = kept
            done += len(kept)
        return found % np.uint32(modulus)
