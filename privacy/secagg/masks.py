"""Seeds -> masks over integers modulo a number. Knows arrays and bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

from privacy.errors import PrivacyError
from privacy.secagg.invitation import Invitation
from privacy.stream import SEED_BYTES, Stream

CHECK_BYTES = 8


def check_of(seed: bytes, context: bytes) -> bytes:
    """8 bytes by which a seed that was put together again is known to be right. They come out of the same derivation as
    the mask and tell no more of it than one part of a key stream of another."""
    return _expand(seed, context)[SEED_BYTES:]


def add_mask(total: NDArray[np.int64], seed: bytes, sign: int, invitation: Invitation) -> None:
    """Adds the seed's mask, or takes it away, in place and without reduction: ``total`` grows by less than the
    modulus."""
    mask = Stream(_expand(seed, invitation.digest)[:SEED_BYTES]).integers(len(total), invitation.modulus)
    if sign > 0:
        np.add(total, mask, out=total, casting="unsafe")
    else:
        np.subtract(total, mask, out=total, casting="unsafe")


def sign_of(own: int, other: int) -> int:
    """What the client at one position does with the mask that it shares with another: the lower adds, the higher
    subtracts, and each adds its own."""
    return 1 if other >= own else -1


def residues(values: NDArray[Any], invitation: Invitation, whose: str) -> NDArray[np.int64]:
    """A copy of a message's integers, checked.

    Raises:
        PrivacyError: they are not as many as invited, no integers, or not from 0 to the modulus - 1.
    """
    if not isinstance(values, np.ndarray) or values.dtype.kind not in "iu" or values.shape != (invitation.length,):
        found = f"{values.dtype} of shape {values.shape}" if isinstance(values, np.ndarray) else type(values).__name__
        raise PrivacyError(f"{whose}: {found}, where {invitation.length} integers were asked for")
    if int(values.min()) < 0 or int(values.max()) >= invitation.modulus:
        raise PrivacyError(f"{whose}: integers beyond 0 to {invitation.modulus - 1}")
    return values.astype(np.int64)


def _expand(seed: bytes, context: bytes) -> bytes:
    return HKDF(SHA256(), SEED_BYTES + CHECK_BYTES, salt=context, info=b"seed").derive(seed)
