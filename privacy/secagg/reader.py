"""Reads bytes that a stranger sent. It gives what was asked for, or raises PrivacyError, never anything else."""

from __future__ import annotations

from privacy.errors import PrivacyError


class Reader:
    """A place in some bytes.

    Args:
        data: as received.
        what: what they claim to be, for errors.
    """

    def __init__(self, data: bytes, what: str) -> None:
        if not isinstance(data, bytes):
            raise PrivacyError(f"{what}: {type(data).__name__} instead of bytes")
        self._data, self._what, self._place = data, what, 0

    def take(self, count: int) -> bytes:
        """The next ``count`` bytes."""
        if len(self._data) - self._place < count:
            raise PrivacyError(f"{self._what} of {len(self._data)} bytes: it ends too soon")
        self._place += count
        return self._data[self._place - count : self._place]

    def number(self, width: int) -> int:
        """The next ``width`` bytes as an unsigned little-endian integer."""
        return int.from_bytes(self.take(width), "little")

    def rest(self) -> bytes:
        """All that is left."""
        return self.take(len(self._data) - self._place)

    def end(self) -> None:
        """Nothing may be left."""
        if left := len(self._data) - self._place:
            raise PrivacyError(f"{self._what} of {len(self._data)} bytes: {left} of them are too many")


def one_byte_length(data: bytes) -> bytes:
    """-> its length (one byte), the bytes. Raises PrivacyError: more than 255."""
    if len(data) > 255:
        raise PrivacyError(f"{data[:16]!r}... of {len(data)} bytes: at most 255 fit")
    return bytes([len(data)]) + data
