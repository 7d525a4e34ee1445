"""Settings -> what a round's clients agree on to be summed. What client and server have in common."""

from __future__ import annotations

import math

from conf.schema import Settings
from gradcodec.build import byte_budget
from gradcodec.layout import Layout
from gradcodec.linear import MAX_LEVELS, Terms
from gradcodec.residues import most_residues
from privacy.budget import LEAST_SHARE
from privacy.discrete import MAX_SIGMA

TAIL = 10.0
"""Standard deviations of noise that a sum has room for: beyond it lies 1e-23."""
_STEPS = 20


def terms_of(settings: Settings, layout: Layout, clients: int) -> Terms:
    """
    Args:
        settings: with ``privacy`` as settled.
        layout: of the adapter.
        clients: that are invited to the sum.

    Raises:
        ValueError: the noise cannot be had in so few integers.
    """
    max_bytes = byte_budget(settings.codec, layout)
    if max_bytes is None:
        raise ValueError("privacy.secure_aggregation=true needs codec.bits=NUMBER: masked integers have no rate of own")
    privacy = settings.privacy
    if not privacy.is_discrete:
        return Terms(clients, max_bytes, privacy.levels)
    assert privacy.noise_multiplier is not None, "settled"
    radius, count = 1.0, 1
    for _ in range(_STEPS):  # the more integers, the longer a rounded update, and the larger the modulus: fewer fit
        modulus = _modulus(radius, clients, noise_deviation(settings, radius) * math.sqrt(clients))
        fitting = min(most_residues(max_bytes, modulus), layout.num_parameters)
        if fitting == count:
            break
        count = fitting
        radius = float(min(math.isqrt(max(count, 1)), (MAX_LEVELS - 1) // 2))
    share = noise_deviation(settings, radius)
    if share > MAX_SIGMA:
        raise ValueError(
            f"privacy.noise=sum: a client's share of the noise has a deviation of {share:.0f} integers, and "
            f"{MAX_SIGMA:.0f} is the most: raise privacy.epsilon or federation.min_replies"
        )
    if share < LEAST_SHARE:
        raise ValueError(
            f"privacy.noise=sum: a client's share of the noise has a deviation of {share:.2f} integers, and it takes "
            f"{LEAST_SHARE:g}: raise codec.bits, or lower federation.min_replies"
        )
    modulus = _modulus(radius, clients, share * math.sqrt(clients))
    levels = 2 * int(radius) + 1
    return Terms(clients, max_bytes, levels, modulus, radius, privacy.clip, noise_variance=clients * share**2)


def noise_deviation(settings: Settings, radius: float) -> float:
    """Of the discrete noise that one client adds, in integers: those of ``federation.min_replies`` make all of it."""
    assert settings.privacy.noise_multiplier is not None, "settled"
    return settings.privacy.noise_multiplier * radius / math.sqrt(settings.federation.min_replies)


def _modulus(radius: float, clients: int, deviation: float) -> int:
    """Odd, and beyond all that a sum can be, but for noise beyond ``TAIL``."""
    return 2 * math.ceil(clients * radius + TAIL * deviation) + 1
