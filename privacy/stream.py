"""Random bytes that nobody can foresee: the keystream of ChaCha20 under a seed of 32 bytes."""

from __future__ import annotations

import os

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from numpy.typing import NDArray


class Stream:
    def __init__(self, seed: bytes) -> None:
        self._keystream = Cipher(algorithms.ChaCha20(seed, bytes(16)), mode=None).encryptor()

    @classmethod
    def fresh(cls) -> Stream:
        return cls(os.urandom(32))

    def bytes(self, count: int) -> bytes:
        return self._keystream.update(bytes(count))

    def uniforms(self, count: int) -> NDArray[np.float64]:
        """In [0, 1), 53 bits each."""
        words = np.frombuffer(self.bytes(8 * count), "<u8")
        return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
