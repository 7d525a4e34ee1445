"""A secret of 16 bytes in shares of 16 bytes, a threshold of which gives it back, and fewer nothing (Shamir, "How to
Share a Secret", CACM 1979, over GF(2^128)). Knows bytes.

pycryptodome deals and combines. Combining is linear: a secret is the sum of its shares times weights which depend on
nothing but whose shares they are. A round has hundreds of secrets and one set of holders, so the weights are asked of
pycryptodome once, by combining shares that are 1 and 0, and only the products are done here: the inverses that make
combining slow are computed once a set of holders instead of once a secret.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

from Crypto.Protocol.SecretSharing import Shamir

SHARE_BYTES = 16
_POLYNOMIAL = (1 << 128) | 0b10000111  # x^128 + x^7 + x^2 + x + 1, the one that pycryptodome reduces by


def split(secret: bytes, threshold: int, holders: int) -> list[bytes]:
    """Shares for holders 1 to ``holders``, in order."""
    return [share for _, share in Shamir.split(threshold, holders, secret, ssss=False)]


def combine(shares: Mapping[int, bytes]) -> bytes:
    """The inverse of ``split``.

    Args:
        shares: by holder, from 1; exactly as many as the threshold. Shares that do not belong together give some other
            16 bytes.
    """
    holders = tuple(sorted(shares))
    secret = 0
    for holder, weight in zip(holders, _weights(holders), strict=True):
        secret ^= _product(int.from_bytes(shares[holder], "big"), weight)
    return secret.to_bytes(SHARE_BYTES, "big")


@lru_cache(maxsize=64)
def _weights(holders: tuple[int, ...]) -> tuple[int, ...]:
    one, none = (1).to_bytes(SHARE_BYTES, "big"), bytes(SHARE_BYTES)
    combined = (
        Shamir.combine([(holder, one if holder == weighed else none) for holder in holders], ssss=False)
        for weighed in holders
    )
    return tuple(int.from_bytes(weight, "big") for weight in combined)


def _product(one: int, other: int) -> int:
    """In GF(2^128)."""
    product = 0
    while other:
        if other & 1:
            product ^= one
        one <<= 1
        if one >> 128:
            one ^= _POLYNOMIAL
        other >>= 1
    return product
