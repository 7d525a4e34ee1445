"""What of a client's update the server sees: all, its code, its code with noise, a mean.

Knows updates and the codec; must not know text or attacks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adapters.model import Adapter
from gradcodec.codec import Codec
from gradcodec.exchange import decode_update, encode_update, max_payload_bytes

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


def norm_of(update: Adapter) -> float:
    """Of all tensors together, L2."""
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in update.values()))


def noised(update: Adapter, clip: float, multiplier: float, seed: int) -> Adapter:
    """Cut to a norm of at most ``clip``, with Gaussian noise of ``multiplier * clip`` on every value (client-level:
    McMahan et al. 2018, at one client). The seed makes it a bench's noise: it protects nothing."""
    generator = torch.Generator().manual_seed(seed)
    scale = min(1.0, clip / max(norm_of(update), 1e-30))
    return {
        name: tensor * scale + torch.randn(tensor.shape, generator=generator) * (multiplier * clip)
        for name, tensor in update.items()
    }


def noise_multiplier(epsilon: float, releases: int = 1, delta: float = DELTA) -> float:
    """Standard deviation over sensitivity of the Gaussian mechanism that is (epsilon, delta)-private over so many
    releases, to 1e-6 (Balle and Wang 2018, theorem 8; Gaussians compose exactly: ``sqrt(releases)``)."""

    def spent(sigma: float) -> float:
        left, right = 1 / (2 * sigma) - epsilon * sigma, -1 / (2 * sigma) - epsilon * sigma
        return _normal(left) - math.exp(epsilon) * _normal(right)

    low, high = 1e-3, 1e3
    while high / low > 1 + 1e-6:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if spent(middle) > delta else (low, middle)
    return high * math.sqrt(releases)


def _normal(value: float) -> float:
    """The standard normal's distribution function."""
    return 0.5 * math.erfc(-value / math.sqrt(2))
