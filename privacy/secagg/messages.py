"""What travels between clients and server for one sum, to the byte. Knows the formats; must not know what they are for.

Numbers are little-endian. With n clients invited, m of them in the sum and d = n - m that dropped out:

    contribution  client -> server   10 + n * 8 + n * (28 + 16 n) bytes, then the masked integers
    request       server -> client   invitation + 6 + ceil(n / 8) + m * (28 + 16 n)
    answer        client -> server   10 + ceil(m / 8) + 16 m (1 + d), less for shares that could not be opened

``Published`` (``privacy.secagg.keys``, 37 bytes and a signature) and ``Invitation`` (``privacy.secagg.invitation``)
stand with what they are. Readers take nothing on trust: bytes parse, or PrivacyError is raised, never anything else; a
count that they claim is checked against their length before anything is made of it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from privacy.errors import PrivacyError
from privacy.secagg.invitation import NONCE_BYTES, TAG_BYTES, Invitation
from privacy.secagg.keys import PUBLISHED_BYTES, SEALED_EXTRA_BYTES
from privacy.secagg.masks import CHECK_BYTES
from privacy.secagg.reader import Reader
from privacy.secagg.shares import SHARE_BYTES

_CONTRIBUTION, _REQUEST, _ANSWER = b"\x01C", b"\x01R", b"\x01A"


@dataclass(frozen=True)
class Contribution:
    """A client's reply. Lists are in the order of the invitation's members; a seed "of" the client's own place is its
    self seed, of another's place the one that it shares with that client."""

    checks: tuple[bytes, ...]  # n of 8 bytes, of the client's seeds
    sealed: tuple[bytes, ...]  # n, for each member its shares of all n seeds
    masked: bytes  # the masked integers, in a format that is not this module's business

    def pack(self, invitation: Invitation) -> bytes:
        """-> version and letter, tag of the context, checks, sealed shares, masked integers."""
        return _CONTRIBUTION + invitation.tag + b"".join(self.checks) + b"".join(self.sealed) + self.masked

    @classmethod
    def unpack(cls, data: bytes, invitation: Invitation) -> Contribution:
        """The inverse of ``pack``. Raises PrivacyError."""
        reader = _reader(data, _CONTRIBUTION, "contribution")
        _expect(reader, invitation.tag, "contribution")
        everyone = range(len(invitation.members))
        checks = tuple(reader.take(CHECK_BYTES) for _ in everyone)
        sealed = tuple(reader.take(_sealed_bytes(invitation)) for _ in everyone)
        return cls(checks, sealed, reader.rest())


@dataclass(frozen=True)
class Request:
    """What the server asks a client in the end: who is in the sum, and what these sealed for it."""

    invitation: Invitation
    summed: tuple[int, ...]  # partitions, ascending
    sealed: tuple[bytes, ...]  # by each of them

    def pack(self) -> bytes:
        """-> version and letter, length of the invitation (uint32) and the invitation, a bit for each member whether
        it is in the sum, the sealed shares."""
        invitation = self.invitation.pack()
        head = _REQUEST + len(invitation).to_bytes(4, "little") + invitation
        return head + _pack_choice(self.summed, self.invitation.partitions) + b"".join(self.sealed)

    @classmethod
    def unpack(cls, data: bytes) -> Request:
        """The inverse of ``pack``. Raises PrivacyError."""
        reader = _reader(data, _REQUEST, "request to unmask")
        invitation = Invitation.unpack(reader.take(reader.number(4)))
        summed = _read_choice(reader, invitation.partitions)
        sealed = tuple(reader.take(_sealed_bytes(invitation)) for _ in summed)
        reader.end()
        return cls(invitation, summed, sealed)


@dataclass(frozen=True)
class Answer:
    """What a client gives in the end: of every client in the sum whose shares it could open, its share of the self
    seed, and of the seeds that this one shares with those who dropped out."""

    shares: dict[int, tuple[bytes, ...]]  # by partition of the dealer: self seed first, then by ascending partition

    def pack(self, request: Request) -> bytes:
        """-> version and letter, tag of the context, a bit for each client in the sum whether its shares follow, the
        shares."""
        head = _ANSWER + request.invitation.tag + _pack_choice(self.shares, request.summed)
        return head + b"".join(b"".join(self.shares[dealer]) for dealer in sorted(self.shares))

    @classmethod
    def unpack(cls, data: bytes, invitation: Invitation, summed: tuple[int, ...]) -> Answer:
        """The inverse of ``pack``. Raises PrivacyError."""
        reader = _reader(data, _ANSWER, "answer")
        _expect(reader, invitation.tag, "answer")
        dealers = _read_choice(reader, summed)
        each = 1 + len(invitation.members) - len(summed)
        shares = {dealer: tuple(reader.take(SHARE_BYTES) for _ in range(each)) for dealer in dealers}
        reader.end()
        return cls(shares)


@dataclass(frozen=True)
class Traffic:
    """Bytes of the protocol for one client, the masked integers left out; the first once a run, the rest in a round."""

    published: int
    invitation: int
    contribution: int
    request: int
    answer: int

    @property
    def up(self) -> int:
        """A round's, from the client."""
        return self.contribution + self.answer

    @property
    def down(self) -> int:
        """A round's, to the client."""
        return self.invitation + self.request


def traffic(clients: int, dropped: int = 0, *, run_bytes: int = 20, signature_bytes: int = 0) -> Traffic:
    """What the protocol costs a client that stays to the end.

    Args:
        clients: that are invited, n.
        dropped: of them, that sent no message.
        run_bytes: length of the run's id.
        signature_bytes: of each key; 0, unsigned. ECDSA with P-384 has 102 to 104.
    """
    summed = clients - dropped
    published = PUBLISHED_BYTES + signature_bytes
    invitation = 2 + 1 + run_bytes + NONCE_BYTES + 20 + clients * published
    sealed = SEALED_EXTRA_BYTES + SHARE_BYTES * clients
    return Traffic(
        published,
        invitation,
        contribution=2 + TAG_BYTES + clients * (CHECK_BYTES + sealed),
        request=2 + 4 + invitation + -(-clients // 8) + summed * sealed,
        answer=2 + TAG_BYTES + -(-summed // 8) + SHARE_BYTES * summed * (1 + dropped),
    )


def _sealed_bytes(invitation: Invitation) -> int:
    return SEALED_EXTRA_BYTES + SHARE_BYTES * len(invitation.members)


def _reader(data: bytes, start: bytes, what: str) -> Reader:
    reader = Reader(data, what)
    if (found := reader.take(len(start))) != start:
        raise PrivacyError(f"{what} begins with {found.hex()}, not {start.hex()}: it is none, or of another version")
    return reader


def _expect(reader: Reader, tag: bytes, what: str) -> None:
    if reader.take(TAG_BYTES) != tag:
        raise PrivacyError(f"{what} that was made for another attempt, round or run")


def _pack_choice(chosen: Collection[int], among: Sequence[int]) -> bytes:
    """-> a bit for each, the first in the lowest."""
    bits = sum(1 << place for place, one in enumerate(among) if one in chosen)
    return bits.to_bytes(-(-len(among) // 8), "little")


def _read_choice(reader: Reader, among: Sequence[int]) -> tuple[int, ...]:
    bits = reader.number(-(-len(among) // 8))
    if bits >> len(among):
        raise PrivacyError("a choice of clients that names more than there are")
    return tuple(one for place, one in enumerate(among) if bits >> place & 1)
