"""Residues: integers modulo a small number <-> bytes, near the logarithm of the modulus each.

What secure aggregation sends is uniform over the residues, so no entropy code makes it smaller. Base-``modulus`` digits
make words of at most 8 bytes, as many as take the fewest bits each; the last, shorter word takes the bytes that it
needs. Knows integers alone.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gradcodec.errors import CodecError

Integers = NDArray[np.int64]

_WORD_BYTES = 8
_LARGEST_WORD = 2**63
"""Words stay positive as int64."""


def packed_bytes(count: int, modulus: int) -> int:
    """Size of what ``pack_residues`` gives of ``count`` residues.

    Raises:
        CodecError: ``count`` is negative, or ``modulus`` below 2 or above 2**63.
    """
    per_word, word_bytes = _word_of(modulus)
    if count < 0:
        raise CodecError(f"{count} residues: a count is at least 0")
    words, rest = divmod(count, per_word)
    return words * word_bytes + _bytes_below(modulus**rest)


def most_residues(max_bytes: int, modulus: int) -> int:
    """How many residues go into so many bytes: the largest count whose ``packed_bytes`` fits."""
    per_word, word_bytes = _word_of(modulus)
    words, rest = divmod(max(max_bytes, 0), word_bytes)
    digits = 0
    while digits + 1 < per_word and _bytes_below(modulus ** (digits + 1)) <= rest:
        digits += 1
    return words * per_word + digits


def pack_residues(residues: Integers, modulus: int) -> bytes:
    """Integers ``[S]`` in 0..modulus-1 -> ``packed_bytes(S, modulus)`` bytes, the first residue lowest in its word.

    Raises:
        CodecError: a value is out of range.
    """
    per_word, word_bytes = _word_of(modulus)
    values = _checked(np.asarray(residues, np.int64), modulus)
    words, rest = divmod(len(values), per_word)
    powers = np.array([modulus**i for i in range(per_word)], np.int64)
    whole = values[: words * per_word].reshape(words, per_word) @ powers
    head = whole.astype("<i8").view(np.uint8).reshape(words, _WORD_BYTES)[:, :word_bytes].tobytes()
    last = int(values[words * per_word :] @ powers[:rest])
    return head + last.to_bytes(_bytes_below(modulus**rest), "little")


def unpack_residues(data: bytes, modulus: int, count: int) -> Integers:
    """Inverse of ``pack_residues``: int64 ``[count]`` in 0..modulus-1.

    Raises:
        CodecError: another number of bytes, or a word that no residues make.
    """
    per_word, word_bytes = _word_of(modulus)
    if len(data) != packed_bytes(count, modulus):
        raise CodecError(f"{len(data)} bytes where {count} residues modulo {modulus} are expected")
    words, rest = divmod(count, per_word)
    padded = np.zeros((words, _WORD_BYTES), np.uint8)
    padded[:, :word_bytes] = np.frombuffer(data, np.uint8, words * word_bytes).reshape(words, word_bytes)
    whole = padded.reshape(-1).view("<u8")
    last = int.from_bytes(data[words * word_bytes :], "little")
    if (words and int(whole.max()) >= modulus**per_word) or last >= modulus**rest:
        raise CodecError(f"bytes that are no residues modulo {modulus}")
    tail = np.array([last // modulus**i % modulus for i in range(rest)], np.int64)
    powers = np.array([modulus**i for i in range(per_word)], np.int64)
    return np.concatenate([(whole.astype(np.int64)[:, None] // powers % modulus).reshape(-1), tail])


def _checked(values: Integers, modulus: int) -> Integers:
    if len(values) and not (int(values.min()) >= 0 and int(values.max()) < modulus):
        raise CodecError(f"residues from {values.min()} to {values.max()}: 0 to {modulus - 1} are expected")
    return values


def _word_of(modulus: int) -> tuple[int, int]:
    """The digits of a word and its bytes, chosen for the fewest bits a digit."""
    if not 2 <= modulus <= _LARGEST_WORD:
        raise CodecError(f"a modulus of {modulus}: 2 to 2**63 are served")
    digits = 1
    while modulus ** (digits + 1) <= _LARGEST_WORD:
        digits += 1
    best = min(range(1, digits + 1), key=lambda d: (_bytes_below(modulus**d) / d, d))
    return best, _bytes_below(modulus**best)


def _bytes_below(limit: int) -> int:
    """Bytes of an integer from 0 to ``limit - 1``."""
    return -(-(limit - 1).bit_length() // 8)
