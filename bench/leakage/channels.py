"""What of a client's update the server sees: all, its code, its code with noise, a mean.

Knows updates and the codec; must not know text or attacks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adapters.model import Adapter
from gradcodec.codec import Codec
from gradcodec.exchange import decode_update, encode_update, max_payload_bytes
from privacy import mechanism
from privacy.accounting import noise_for

DELTA = 1e-5
EPSILONS = (8.0, 2.0)


@dataclass(frozen=True)
class Channel:
    """``bits``: of the codec, a parameter; None: float32. ``epsilon``: of the Gaussian noise on the whole update,
    before it is coded; None: no noise. ``clients``: whose mean is all that is seen."""

    name: str
    bits: float | None = None
    epsilon: float | None = None
    clients: int = 1


CHANNELS = (
    Channel("dense"),
    Channel("coded, 0.5 bit", bits=0.5),
    Channel("coded, 0.1 bit", bits=0.1),
    *(Channel(f"coded, 0.5 bit, epsilon {epsilon:g}", bits=0.5, epsilon=epsilon) for epsilon in EPSILONS),
    Channel("mean of 5", clients=5),
    Channel("mean of 10", clients=10),
)


@dataclass(frozen=True)
class Ends:
    """What both ends know of a round: its codec, its side information, the norm to which noisy updates are cut, and
    over how many releases of a client ``Channel.epsilon`` is spent."""

    codec: Codec
    side: Tensor | None
    clip: float
    releases: int = 1


def transmit(channel: Channel, updates: Sequence[Adapter], ends: Ends, seed: int) -> Adapter:
    """What the server sees of the first of these updates, float32: the mean of the first ``channel.clients``, cut and
    noised, encoded and decoded."""
    seen = {name: torch.stack([one[name] for one in updates[: channel.clients]]).mean(0) for name in updates[0]}
    if channel.epsilon is not None:
        seen = noised(seen, ends.clip, noise_multiplier(channel.epsilon, ends.releases), seed)
    if channel.bits is None:
        return seen
    most = max_payload_bytes(channel.bits, ends.codec.layout.num_parameters)
    payload, _ = encode_update(seen, None, codec=ends.codec, max_bytes=most, side=ends.side)
    return decode_update(payload, codec=ends.codec, side=ends.side)


def noised(update: Adapter, clip: float, multiplier: float, seed: int) -> Adapter:
    """Client-level differential privacy as runs have it, but that the seed makes it a bench's noise: it protects
    nothing."""
    generator = torch.Generator().manual_seed(seed)
    bounded = mechanism.clipped(update, clip)
    return mechanism.noised(bounded, multiplier * clip, lambda shape: torch.randn(shape, generator=generator))


def noise_multiplier(epsilon: float, releases: int = 1) -> float:
    """Standard deviation over sensitivity of so many releases that are (epsilon, ``DELTA``)-private together."""
    return noise_for(epsilon, DELTA, releases)
