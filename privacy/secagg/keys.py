"""Keys of a client for a run: made at the roll call, signed by its node, and what two clients derive from theirs. Knows
bytes; must not know rounds' members or messages.

The key pair is X25519 (RFC 7748). It lives as long as the run: whoever gets the secret half later can open what this
client sent in that run, so it is removed at the run's end. The signature is ECDSA with SHA-256 by the key that a
SuperNode authenticates with; it says that this key is this node's, for this run and partition. Without it a client
takes the server's word for whose key it is, and a server that puts its own in everybody's place reads everything.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, EllipticCurvePrivateKey, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from privacy.errors import PrivacyError
from privacy.secagg.reader import Reader, one_byte_length

KEY_BYTES = 32
SEED_BYTES = 16
NONCE_BYTES, TAG_BYTES = 12, 16
SEALED_EXTRA_BYTES = NONCE_BYTES + TAG_BYTES
PUBLISHED_BYTES = 4 + KEY_BYTES + 1
"""Of a published key, beside its signature (0 to 255 bytes; 104 at most with P-384)."""
_STATEMENT = b"cg-fedllm: key for secure aggregation, version 1"


class KeyPair:
    """A client's key pair. ``secret`` is what to keep, on disk and from everybody; ``public`` goes to the others.

    Args:
        secret: 32 bytes. ``KeyPair.fresh()`` draws them.

    Raises:
        PrivacyError: they are not 32 bytes.
    """

    def __init__(self, secret: bytes) -> None:
        if len(secret) != KEY_BYTES:
            raise PrivacyError(
                f"a secret key of {len(secret)} bytes: it has {KEY_BYTES}; the file that held it is damaged"
            )
        self._private = X25519PrivateKey.from_private_bytes(secret)
        self.secret = secret
        self.public = self._private.public_key().public_bytes_raw()

    @classmethod
    def fresh(cls) -> KeyPair:
        """A new one from the operating system's randomness."""
        return cls(os.urandom(KEY_BYTES))

    def publish(self, run: str, partition: int, node_key: EllipticCurvePrivateKey | None = None) -> Published:
        """The public half as it goes to the others, signed where the node has a key to sign with."""
        signature = b""
        if node_key is not None:
            signature = node_key.sign(_statement(run, partition, self.public), ECDSA(SHA256()))
        return Published(partition, self.public, signature)

    def channel(self, other: bytes, context: bytes) -> Channel:
        """What this client and the holder of the public key ``other``, which may be itself, share in a context.

        Raises:
            PrivacyError: the other's key is none.
        """
        try:
            return Channel(self._private.exchange(X25519PublicKey.from_public_bytes(other)), context)
        except ValueError:
            raise PrivacyError(
                f"public key {other.hex()[:16]}... is no X25519 key: its holder must publish another"
            ) from None


@dataclass(frozen=True)
class Published:
    """A client's public key for a run. ``signature`` is empty where its node has no key."""

    partition: int
    public_key: bytes
    signature: bytes = b""

    def pack(self) -> bytes:
        """-> partition (uint32), key (32 bytes), length of the signature (one byte), signature."""
        return struct.pack("<I", self.partition) + self.public_key + one_byte_length(self.signature)

    @classmethod
    def read(cls, reader: Reader) -> Published:
        """The inverse of ``pack``, from the reader's place on."""
        return cls(reader.number(4), reader.take(KEY_BYTES), reader.take(reader.number(1)))

    @classmethod
    def unpack(cls, data: bytes) -> Published:
        """The inverse of ``pack``. Raises PrivacyError: no such bytes, or a key that nobody can share a secret with,
        which would keep all others from taking part."""
        reader = Reader(data, "published key")
        found = cls.read(reader)
        reader.end()
        KeyPair.fresh().channel(found.public_key, b"")
        return found

    def is_signed_by(self, node_key: EllipticCurvePublicKey, run: str) -> bool:
        """Whether the node of this public key signed it, for this run and partition."""
        try:
            node_key.verify(self.signature, _statement(run, self.partition, self.public_key), ECDSA(SHA256()))
        except InvalidSignature:
            return False
        return True


def _statement(run: str, partition: int, public_key: bytes) -> bytes:
    return _STATEMENT + one_byte_length(run.encode()) + struct.pack("<I", partition) + public_key


class Channel:
    """Secrets of two clients in one context. Both derive the same; other contexts' tell nothing of them."""

    def __init__(self, shared: bytes, context: bytes) -> None:
        self._shared, self._context = shared, context

    @property
    def seed(self) -> bytes:
        """Of the mask that the two add and subtract, 16 bytes."""
        return self._derive(b"mask", SEED_BYTES)

    def seal(self, text: bytes, sender: int, recipient: int) -> bytes:
        """-> nonce (12 bytes), ChaCha20-Poly1305 of the text, tag (16 bytes). The nonce is random, so that a client
        which lost its memory and answers a context twice does not use one key stream twice."""
        nonce = os.urandom(NONCE_BYTES)
        return nonce + self._cipher(sender, recipient).encrypt(nonce, text, None)

    def open(self, sealed: bytes, sender: int, recipient: int) -> bytes | None:
        """The inverse of ``seal``; None: it was made for others, in another context, or damaged."""
        try:
            return self._cipher(sender, recipient).decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], None)
        except (InvalidTag, ValueError):
            return None

    def _cipher(self, sender: int, recipient: int) -> ChaCha20Poly1305:
        return ChaCha20Poly1305(self._derive(b"shares" + struct.pack("<II", sender, recipient), 32))

    def _derive(self, info: bytes, length: int) -> bytes:
        return HKDF(SHA256(), length, salt=self._context, info=info).derive(self._shared)
