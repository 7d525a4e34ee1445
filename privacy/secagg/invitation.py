"""What the server asks of the clients of a round, and the context that seeds, shares and answers are bound to.

All of them get the same invitation. Its digest goes into every key that is derived from two clients' keys: clients that
were shown different invitations share nothing, and their masks do not cancel.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

from privacy.errors import PrivacyError
from privacy.secagg.keys import KEY_BYTES, Published
from privacy.secagg.limits import MAX_CLIENTS, check_numbers
from privacy.secagg.reader import Reader, one_byte_length
from privacy.stream import MAX_MODULUS

NONCE_BYTES = 16
TAG_BYTES = 8
INVITATION = b"\x01I"
"""What an invitation begins with: the version of the protocol's bytes, and a letter."""
_UINT32 = 1 << 32
_NUMBERS = struct.Struct("<IHQIH")  # round, threshold, modulus, length, clients


@dataclass(frozen=True)
class Invitation:
    """One attempt of a round to get a sum.

    Raises:
        PrivacyError: a number or name that is out of its range, or clients that are not distinct and in order.
    """

    run: str  # the run's id, 1 to 255 bytes
    round: int  # uint32
    members: tuple[Published, ...]  # by ascending partition, each with a key of its own
    threshold: int  # how many must answer in the end
    modulus: int  # 2 to 2^32
    length: int  # integers in every message, 1 to 2^32 - 1
    nonce: bytes = field(default_factory=lambda: os.urandom(NONCE_BYTES))

    def __post_init__(self) -> None:
        check_numbers(len(self.members), self.threshold)
        for name, value, least, most in (
            ("round", self.round, 0, _UINT32 - 1),
            ("modulus", self.modulus, 2, MAX_MODULUS),
            ("length", self.length, 1, _UINT32 - 1),
            ("bytes of the run's id", len(self.run.encode()), 1, 255),
            ("bytes of the nonce", len(self.nonce), NONCE_BYTES, NONCE_BYTES),
        ):
            if not least <= value <= most:
                raise PrivacyError(f"invitation with {value} as {name}: it lies from {least} to {most}")
        _check_members(self.members)

    @cached_property
    def digest(self) -> bytes:
        """The context: SHA-256 of all that the invitation holds, 32 bytes."""
        return hashlib.sha256(self.pack()).digest()

    @property
    def tag(self) -> bytes:
        """The context's first 8 bytes, which messages carry so that one of another attempt is noticed."""
        return self.digest[:TAG_BYTES]

    @property
    def partitions(self) -> tuple[int, ...]:
        """Of its members, ascending."""
        return tuple(member.partition for member in self.members)

    def position(self, partition: int) -> int:
        """Where a partition stands among the members, from 0. Raises PrivacyError: it does not."""
        try:
            return self.partitions.index(partition)
        except ValueError:
            raise PrivacyError(f"partition {partition} was not invited to this sum") from None

    def pack(self) -> bytes:
        """-> version and letter, length of the run's id (one byte) and the id, nonce (16 bytes), round (uint32),
        threshold (uint16), modulus (uint64), length (uint32), number of members (uint16), the members' keys."""
        numbers = _NUMBERS.pack(self.round, self.threshold, self.modulus, self.length, len(self.members))
        head = INVITATION + one_byte_length(self.run.encode()) + self.nonce + numbers
        return head + b"".join(member.pack() for member in self.members)

    @classmethod
    def unpack(cls, data: bytes) -> Invitation:
        """The inverse of ``pack``. Raises PrivacyError, and nothing else, whatever the bytes."""
        reader = Reader(data, "invitation")
        if (start := reader.take(len(INVITATION))) != INVITATION:
            raise PrivacyError(f"invitation begins with {start.hex()}, not {INVITATION.hex()}: another version made it")
        try:
            run = reader.take(reader.number(1)).decode()
        except UnicodeDecodeError:
            raise PrivacyError("invitation whose run's id is no text") from None
        nonce = reader.take(NONCE_BYTES)
        number, threshold, modulus, length, clients = _NUMBERS.unpack(reader.take(_NUMBERS.size))
        if clients > MAX_CLIENTS:
            raise PrivacyError(f"invitation of {clients} clients: at most {MAX_CLIENTS} are served")
        members = tuple(Published.read(reader) for _ in range(clients))
        reader.end()
        return cls(run, number, members, threshold, modulus, length, nonce)


def _check_members(members: Iterable[Published]) -> None:
    members = tuple(members)
    partitions = [member.partition for member in members]
    if partitions != sorted(set(partitions)):
        raise PrivacyError(f"invitation of partitions {partitions}: each stands there once, in ascending order")
    if any(not 0 <= partition < _UINT32 for partition in partitions):
        raise PrivacyError(f"invitation of partitions {partitions}: they lie from 0 to {_UINT32 - 1}")
    holders: dict[bytes, int] = {}
    for member in members:
        if len(member.public_key) != KEY_BYTES:
            raise PrivacyError(
                f"partition {member.partition} has a key of {len(member.public_key)} bytes, not {KEY_BYTES}"
            )
        first = holders.setdefault(member.public_key, member.partition)
        if first != member.partition:
            raise PrivacyError(f"partitions {first} and {member.partition} have the same public key")
