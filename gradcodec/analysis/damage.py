"""What becomes of a payload that is damaged on its way: flipped bits, and packets that are lost.

A payload's checksum covers all of it, so that the right answer is a refusal, after which the client's next payload
carries all of the update (error feedback): ``frame.py``. *Unchecked* says what the same damage would have come to had
nobody looked: the body with the damage, and a checksum that goes with it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from gradcodec.errors import CodecError
from gradcodec.fidelity import inner_product, squared_distance
from gradcodec.frame import HEADER_BYTES, with_body
from gradcodec.training.coding import Coding
from gradcodec.training.recording import Update

FLIPS = (1, 8, 64)
"""Bits of a payload that are flipped."""
LOSSES = (0.01, 0.1, 0.5)
"""Shares of packets that are lost."""
PACKET_BYTES = 1400


@dataclass(frozen=True)
class Damage:
    """One kind of damage to one codec's payloads.

    Attributes:
        codec: which.
        kind: ``bits`` or ``packets``.
        amount: bits flipped, or the share of packets that are lost (one at least).
        trials: payloads that were damaged.
        refused: the share that was refused.
        error: median error energy of those that were decoded, over the update's; None: there was none.
        unchecked_refused: the share that the codec itself refuses where the checksum says nothing.
        unchecked_error: median error energy of those that it decodes.
        unchecked_worst: the largest of them.
    """

    codec: str
    kind: str
    amount: float
    trials: int
    refused: float
    error: float | None
    unchecked_refused: float
    unchecked_error: float | None
    unchecked_worst: float | None


def damaged(
    coding: Coding,
    updates: Sequence[Update],
    *,
    flips: Sequence[int] = FLIPS,
    losses: Sequence[float] = LOSSES,
    trials: int = 8,
    seed: int = 0,
) -> list[Damage]:
    """Rows of both kinds; every trial damages another of the updates' payloads in another place."""
    payloads = [coding.payload(update.blocks_RC, update.round) for update in updates]
    rows = []
    chance = random.Random(seed)
    for count in flips:
        rows.append(_tried(coding, updates, payloads, ("bits", count), _Flip(count, chance), trials))
    for share in losses:
        rows.append(_tried(coding, updates, payloads, ("packets", share), _Lose(share, chance), trials))
    return rows


_Spoil = Callable[[bytes], tuple[bytes, bytes]]
"""Payload -> what arrives, and the body of the same length with the same damage."""


class _Flip:
    def __init__(self, count: int, chance: random.Random) -> None:
        self._count, self._chance = count, chance

    def __call__(self, payload: bytes) -> tuple[bytes, bytes]:
        """Anywhere in the payload; for the unchecked one, in its body."""
        return self._flipped(payload), self._flipped(payload[HEADER_BYTES:])

    def _flipped(self, data: bytes) -> bytes:
        spoilt = bytearray(data)
        for bit in self._chance.sample(range(8 * len(data)), min(self._count, 8 * len(data))):
            spoilt[bit // 8] ^= 1 << bit % 8
        return bytes(spoilt)


class _Lose:
    def __init__(self, share: float, chance: random.Random) -> None:
        self._share, self._chance = share, chance

    def __call__(self, payload: bytes) -> tuple[bytes, bytes]:
        """Without the packets that are lost; for the unchecked one, zeros stand in their place."""
        starts = range(0, len(payload), PACKET_BYTES)
        lost = {start for start in starts if self._chance.random() < self._share} or {self._chance.choice(starts)}
        packets = {start: payload[start : start + PACKET_BYTES] for start in starts}
        arrived = b"".join(packet for start, packet in packets.items() if start not in lost)
        filled = b"".join(bytes(len(one)) if start in lost else one for start, one in packets.items())
        return arrived, filled[HEADER_BYTES:]


def _tried(
    coding: Coding,
    updates: Sequence[Update],
    payloads: Sequence[bytes],
    what: tuple[str, float],
    spoil: _Spoil,
    trials: int,
) -> Damage:
    errors: list[float | None] = []
    unchecked: list[float | None] = []
    for trial in range(trials):
        update, payload = updates[trial % len(updates)], payloads[trial % len(updates)]
        arrived, body = spoil(payload)
        errors.append(_error(coding, update, arrived))
        unchecked.append(_error(coding, update, with_body(payload, body)))
    decoded, taken = ([e for e in found if e is not None] for found in (errors, unchecked))
    return Damage(
        coding.name,
        *what,
        trials,
        1 - len(decoded) / trials,
        median(decoded) if decoded else None,
        1 - len(taken) / trials,
        median(taken) if taken else None,
        max(taken, default=None),
    )


def _error(coding: Coding, update: Update, payload: bytes) -> float | None:
    """Over the update's energy; None: the payload is refused."""
    try:
        decoded_RC = coding.decoded(payload, update.round)
    except CodecError:
        return None
    return squared_distance(update.blocks_RC, decoded_RC) / (inner_product(update.blocks_RC, update.blocks_RC) or 1.0)
